"""CFLOW-AD: Gudovskiy, Ishizaka and Kozuka, "CFLOW-AD: Real-Time Unsupervised Anomaly Detection with Localization via
Conditional Normalizing Flows", WACV 2022.

On each of three feature maps a normalising flow learns how likely a good part's feature vector is, given where it lies;
a position is as abnormal as its vectors are unlikely.

Where this differs from the paper, and the setting that takes the difference back (`--preset paper` takes back all that
can be):

- A step sees all positions of some images, and lowers the summed losses of all flows, which share no parameter: under
  Adam this is an optimiser for each flow. The authors shuffle the positions of an image batch into fibres of 256, and
  step after each fibre of one level (`fibres=256`); as their one Adam finds zero gradients for the other flows, these
  go on by momentum (`shared_adam=true`).
- Vectors are averages over 3 x 3 positions (`pool=1`), and whitened. Flows start as a rotation, so that training sets
  out from the Gaussian density of the features; the paper's set out from random subnets on the features themselves
  (`whiten=false`). The log-determinant of the whitening, a constant, is not part of the likelihood.
- Likelihoods are divided by their maximum over the training images, as in CLS-CNFs (Oh & Kim, IEEE Access 2024, Eq. 4).
  The authors take the maximum over the test images, which nobody has at inspection.
- The image score is half the squared length of z, mean over the channels of all levels and largest over positions,
  before smoothing. It leaves the log-determinant out, which takes back some of what z says: a flow stretches what is
  unusual less. It also reads a deeper level beside those of the map (`deep_levels=` for none). The map's own values are
  flat where defects are strong. `image_score=density` is -log p; `image_score=map` is the paper's, the map's largest.
- Subnets are half as wide (`hidden=2`).
- There are fewer epochs, of smaller batches at a larger learning rate (`epochs`, `max_steps`, `batch_size`,
  `learning_rate`).

Levels meet on the finest's grid, half-pixel centres; the authors' meet at the input size, corners aligned. They pad the
convolutions of their backbone by reflection; timm's pad with zeros, and no setting changes that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flawmap.backbones import Backbone
from flawmap.methods.blocks.position_flows import (
    PositionFlows,
    PositionFlowsConfig,
    on_common_grid,
    with_levels,
)
from flawmap.methods.blocks.smoothing import Enlarge, largest
from flawmap.methods.contract import LevelledConfig, Method, Stage
from flawmap.methods.presets import Preset, read_presets


class CFlowConfig(PositionFlowsConfig, LevelledConfig):
    """Settings of CFLOW-AD."""

    sigma: float = Field(4.0, ge=0, le=1000, description="Gaussian smoothing of the map, in input pixels")


class CFlow(Method):
    """See the module's docstring."""

    Config = CFlowConfig
    presets: ClassVar[dict[str, Preset]] = read_presets("cflow")
    optimises: ClassVar[bool] = True
    config: CFlowConfig

    def __init__(self, config: CFlowConfig, backbone: Backbone, size: tuple[int, int]) -> None:
        super().__init__(config, backbone, size)
        grids = [(round(size[0] / factor), round(size[1] / factor)) for factor in backbone.reductions]
        self.density = PositionFlows(config, backbone.channels, grids)
        self.mapped = len(config.levels or backbone.levels)  # levels of the map; those of the image score follow
        self.grid = max(grids[: self.mapped])
        self.resize = Enlarge(self.grid, size, config.sigma)

    @classmethod
    def resolved(cls, config: CFlowConfig, backbone: str) -> CFlowConfig:
        return with_levels(config, backbone)

    def stages(self, images: int) -> Iterator[Stage]:
        return self.density.stages(images)

    def score(self, features: list[Tensor], inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found = self.density.likelihoods(features)
        anomaly_map = torch.zeros(())
        for level, (log_p, _) in enumerate(found[: self.mapped]):
            anomaly_map = anomaly_map + on_common_grid(self.density.relative(log_p, level), self.grid, inside)
        if self.config.image_score == "map":
            return anomaly_map, self.enlarge(anomaly_map, inside).amax((1, 2, 3))
        return anomaly_map, largest(self.density.unlikely(found, self.grid, inside), inside)
