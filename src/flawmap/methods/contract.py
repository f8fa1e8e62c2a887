"""What a method is: a module that says what has to happen in training, and turns features into an anomaly map.

A method owns no loop. `stages()` yields what has to happen, in order; `flawmap.learning.loop` runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from flawmap.backbones import Backbone
from flawmap.methods.blocks.levelling import Levelling
from flawmap.methods.blocks.smoothing import Enlarge, largest
from flawmap.methods.presets import Preset
from flawmap.synthesis import SynthesisSettings


@dataclass(frozen=True)
class SyntheticDefects:
    """Inputs of a stage that trains on defects made on the spot, other ones in every epoch.

    Its function takes three tensors: good model inputs (B, 3, H, W), the same with a defect each, and the defects'
    masks (B, 1, H, W) of 0 and 1.

    Attributes:
        settings: how defects are made.
        clean: share of the inputs that stay as they are, under an empty mask.
        textures: a folder of texture photographs; None draws textures.
        foreground: defects lie on the part, where the images show parts on a ground.
    """

    settings: SynthesisSettings
    clean: float = 0.0
    textures: Path | None = None
    foreground: bool = True


Inputs = Literal["features", "images"] | SyntheticDefects


class Config(BaseModel):
    """A method's settings. Every field can be set by `--set key=value`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LevelledConfig(Config):
    """Settings of a method whose maps may be levelled."""

    level: Literal["none", "auto"] = Field(
        "none", description="auto levels maps by good images' own, where parts lie alike"
    )


@dataclass(frozen=True)
class Collect:
    """One pass over the training inputs, then a closing computation: moments, a bank, a coreset.

    Attributes:
        name: what the progress line says.
        update: takes one batch: the list of maps (B, C, H, W) for "features", or [images (B, 3, H, W)]; and where the
            images are scored, (B, 1, H, W) of 0 and 1 at the input size, or None for everywhere.
        close: computes the result and leaves it in the method's buffers; reports progress as (done, total).
        inputs: what it collects from.
        peak_bytes: what the stage holds at its highest, stated before it starts.
    """

    name: str
    update: Callable[[list[Tensor], Tensor | None], None]
    close: Callable[[Callable[[int, int], None]], None]
    peak_bytes: int
    inputs: Inputs = "features"


@dataclass(frozen=True)
class Optimise:
    """Epochs of gradient steps.

    Attributes:
        name: what the progress line says.
        loss: one batch, as in `Collect.update`, -> a scalar, or scalars one after the other, each of which gets a step
            of its own. Must be finite. What it draws at random it draws from PyTorch's default generator, which is
            seeded anew for every epoch.
        parameters: what is trained.
        epochs, batch_size: the schedule; batches are drawn in an order given by the seed and the epoch.
        optimiser: parameters -> optimiser.
        schedule: (optimiser, steps in all) -> learning-rate schedule, stepped after every batch; None: constant.
        clip: the gradient norm is clipped to it; None leaves it.
        inputs: what it trains on.
        views: an epoch takes one of the rotated views of every input, see `Method.views`; else the input as it is.
        keep_gradients: parameters that a step does not reach have a gradient of zero, with which optimisers go on by
            momentum, as PyTorch did before 2.0; else they rest.
        before_epoch: called with the epoch's number, from 0, also where a training goes on.
        after_epoch: what the line about an epoch adds to its mean loss, such as the value of a learnt radius.
    """

    name: str
    loss: Callable[[list[Tensor], Tensor | None], Tensor | Iterable[Tensor]]
    parameters: Sequence[nn.Parameter]
    epochs: int
    batch_size: int
    optimiser: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    schedule: Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler] | None = None
    clip: float | None = None
    inputs: Inputs = "features"
    views: bool = False
    keep_gradients: bool = False
    before_epoch: Callable[[int], None] | None = None
    after_epoch: Callable[[], str] | None = None


Stage = Collect | Optimise


def epochs_within(max_steps: int, epochs: int, images: int, batch_size: int) -> int:
    """`epochs`, or fewer where they would take more than `max_steps` steps; 0 is no limit."""
    return min(epochs, math.ceil(max_steps / math.ceil(images / batch_size))) if max_steps else epochs


class Method(nn.Module):
    """The contract. A method file holds a `Config` and one subclass of this.

    Attributes:
        Config: the settings' type.
        resize: made by each method that has a map, with its grid and smoothing.
        presets: named settings; "paper" is the printed set-up.
        localises: False for methods that score images only; they have no map.
        positional: True where each position of the input is learnt apart, so that parts have to be aligned.
        updates: True where `further_stages` can add images to a trained method.
        pools: True where the extractor pools whole maps, and so has to know where an image is scored: it then takes
            (images, inside).
        tunes: True where stages train the extractor; stages after those, and calibration, take its features anew.
        trained_on: the kinds of synthetic defect, of `flawmap.synthesis.KINDS`, that stages may make, and those too
            near them to be new to the method; tuning makes other ones.
        live: settings that can be moved after training, see `with_settings`.
        searched: the values of each live setting among which the method's paper chooses.
        reselects: True where `reselect` has something to choose.
        live_buffers: what moves with them; inputs of the graph that inspects, so that it is made once.
        costly_buffers: those of them that take long to make; the others an exported file makes of the settings itself.
        symbols: what an exported file calls a live setting, where that is not its name here.
        optimises: True where stages train by gradient; such methods hold out good images for calibration.
        groups: (N,) int64, in training the group of each of the N model inputs, in the order in which stages are given
            them: inputs of one image, and of images that show the same, have one. None where nothing is left out.
        levelling: what levels the maps, see `levelled`; None where `level` is "none" or not a setting.
    """

    Config: ClassVar[type[Config]] = Config
    presets: ClassVar[dict[str, Preset]] = {}
    localises: ClassVar[bool] = True
    optimises: ClassVar[bool] = False
    updates: ClassVar[bool] = False
    positional: ClassVar[bool] = False
    pools: ClassVar[bool] = False
    tunes: ClassVar[bool] = False
    trained_on: ClassVar[frozenset[str]] = frozenset()
    live: ClassVar[tuple[str, ...]] = ()
    searched: ClassVar[dict[str, tuple[float, ...]]] = {}
    reselects: ClassVar[bool] = False
    live_buffers: ClassVar[tuple[str, ...]] = ()
    costly_buffers: ClassVar[tuple[str, ...]] = ()
    symbols: ClassVar[dict[str, str]] = {}

    resize: Enlarge

    def __init__(self, config: Any, backbone: Backbone, size: tuple[int, int]) -> None:
        """`size` is the input size (height, width); `backbone` reads `levels(config)`."""
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.size = size
        self.groups: Tensor | None = None
        self.levelling = Levelling() if getattr(config, "level", "none") == "auto" else None

    @classmethod
    def resolved(cls, config: Any, backbone: str) -> Any:
        """The settings with the backbone's own choices in place of what was left open, as the model file keeps them."""
        return config

    @classmethod
    def levels(cls, config: Any) -> tuple[str, ...]:
        """The backbone levels that `features` returns, of resolved settings: `levels`, then further `deep_levels`."""
        return tuple(dict.fromkeys((*(config.levels or ()), *(getattr(config, "deep_levels", None) or ()))))

    @classmethod
    def views(cls, config: Any) -> tuple[int, float]:
        """How many views of each input are cached, the input itself the first, and by how many degrees at most the
        others are rotated."""
        return 1, 0.0

    @classmethod
    def extractor(cls, config: Any, backbone: Backbone, size: tuple[int, int]) -> nn.Module:
        """What makes the maps that are cached: images (B, 3, H, W) -> maps (B, C, h, w).

        The first of them belong to the backbone's levels, in their order.
        """
        return backbone

    def extracting(self) -> nn.Module:
        """`extractor` with the weights that this method has by now."""
        return type(self).extractor(self.config, self.backbone, self.size)

    def stages(self, images: int) -> Iterator[Stage]:
        """What has to happen in training on `images` model inputs, in order.

        A stage may rely on what those before it left in buffers and parameters, and on nothing else of theirs.
        """
        raise NotImplementedError

    def further_stages(self, images: int) -> Iterator[Stage]:
        """What has to happen to learn `images` further model inputs on top of those learnt before."""
        raise NotImplementedError

    def features(self, images: Tensor, inside: Tensor | None = None) -> list[Tensor]:
        """images (B, 3, H, W) -> the maps that the method reads."""
        extractor = self.extracting()
        maps: list[Tensor] = extractor(images, inside) if self.pools else extractor(images)
        return maps

    def score(self, features: list[Tensor], inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Anomaly map (B, 1, h, w), at whatever resolution the method has, and image score (B,).

        Both float32, higher is more abnormal, in the method's own units. One call, since what gives the one mostly
        gives the other. Nothing outside `inside` (B, 1, H, W), of 0 and 1 at the input size, raises the image score;
        None is everywhere.
        """
        raise NotImplementedError

    def enlarge(self, anomaly_map: Tensor, inside: Tensor | None = None) -> Tensor:
        """(B, 1, h, w) -> (B, 1, H, W) at the input size, smoothed as the method's paper does, by `resize`.

        Outside `inside` lies the smallest value inside.
        """
        enlarged: Tensor = self.resize(anomaly_map, inside)
        return enlarged

    def levelled(self, anomaly_map: Tensor, image_score: Tensor, inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `score` gave; where `levelling` has learnt, with a level map, mostly scored by its largest value."""
        if self.levelling is None or not self.levelling.levels:
            return anomaly_map, image_score
        level = self.levelling(anomaly_map)
        return level, largest(level, inside) if self.levelling.scores else image_score

    def leave_one_out(
        self, features: list[Tensor], inside: Tensor | None, groups: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """`score` of training inputs, each as if all inputs of its group had been left out of training.

        `groups` (B,) are numbers of `Method.groups`; all inputs of each of these groups are among the features. None,
        the default, where there is no closed form; calibration then refits on folds.
        """
        return None

    def forget(self) -> None:
        """Drops what only `leave_one_out` needs; called when all is calibrated."""
        self.groups = None

    def with_settings(self, config: Any) -> Method:
        """This method with other values of its `live` settings; all that does not depend on them is shared."""
        raise NotImplementedError

    def live_state(self, settings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The `live_buffers` at values () of all `live` settings, by operations that an exported file can hold."""
        raise NotImplementedError

    def latents(self, features: list[Tensor], inside: Tensor | None = None) -> Tensor:
        """What is left to be done from here on depends on the `live` settings: (B, T, C) float32."""
        raise NotImplementedError

    def score_latents(self, latents: Tensor, inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`score` from what `latents` made of the features."""
        raise NotImplementedError

    def reselect(self, latents: Tensor) -> None:
        """Chooses what depends on the `live` settings, such as a gallery, anew among latents (N, C) of good patches."""
        raise NotImplementedError

    def forward(self, images: Tensor, inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) -> anomaly map (B, 1, H, W) and image score (B,)."""
        features = self.features(images, inside)
        anomaly_map, image_score = self.levelled(*self.score(features, inside), inside)
        return self.enlarge(anomaly_map, inside), image_score

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Like `load_state_dict`, also for buffers whose size only training knew.

        Raises:
            KeyError, RuntimeError: tensors are missing, unknown, or of a shape the method cannot have.
        """
        for name, buffer in list(self.named_buffers()):
            if name in state and state[name].shape != buffer.shape:
                owner, _, key = name.rpartition(".")
                module = self.get_submodule(owner)
                if buffer.numel() != 0 or buffer.shape[1:] != state[name].shape[1:]:
                    raise RuntimeError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(buffer.shape)}")
                module.register_buffer(key, torch.empty_like(state[name], dtype=buffer.dtype))
        self.load_state_dict(state)
        if self.levelling is not None and self.levelling.levels:
            places = self.resize.rows.shape[1] * self.resize.columns.shape[0]
            if not self.levelling.shift.numel() == self.levelling.gain.numel() == places:
                raise RuntimeError(f"levelling is of another grid than the {places} places of the map")
