"""DifferNet: Rudolph, Wandt and Rosenhahn, "Same Same But DifferNet", WACV 2021.

One vector stands for an image seen at one angle: a backbone's maps, averaged over the image, at several scales. A flow
turns the vectors of good images into Gaussian ones; an image is as abnormal as its vectors are unlikely.

Where this differs from the paper, and the setting that takes the difference back (`--preset paper` takes back all that
can be):

- Vectors hold means and standard deviations of several levels; the paper has the means of the last one (`deepest`,
  `deviations`). A standard deviation tells of a small defect that is lost in the mean.
- Vectors are standardised, and the flow reads their first principal components, whitened; what lies outside those is
  isotropic Gaussian noise (probabilistic PCA: Tipping & Bishop 1999), so the density is that of the whole vector. A
  defect moves an image mostly where good images do not vary. The paper's flow reads the vectors (`components=0`).
- The flow starts as the identity, and so the score at a regularised Mahalanobis distance (`identity`). Subnets are
  narrow and have two layers; the paper's have four, 2048 wide (`hidden`, `layers`). Noise is added to what the flow
  reads in training (`noise`), and there are fewer epochs.
- Angles are fixed and evenly spaced, the same in training and after, so that features can be cached; the paper draws 4
  at every step, 96 vectors of 24 images, and 64 for each image that it scores (`rotations=64`, `step_rotations=4`).
- AlexNet, its backbone, is not among timm's networks: `--preset paper` asks for another by `--backbone`. Brightness and
  contrast, which its experiments on magnetic tiles vary, stay as they are.
- Images shrink by averaging 2 x 2 pixels; the authors' code takes one of them.

The score leaves the log-determinant out, as the paper's does. There is no anomaly map; `gradient_map` shows on which
pixels the score depends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from flawmap.backbones import Backbone, levels_at
from flawmap.backbones.pyramid import Pyramid
from flawmap.flows import Block, Coupling, Flow, Mixing, mlp
from flawmap.methods.blocks.smoothing import Enlarge
from flawmap.methods.contract import Collect, Config, Method, Optimise, Stage
from flawmap.methods.presets import Preset, read_presets

_VECTORS = 4096  # that the principal components are made of, or nearly so many
_BOUND = 3.0  # alpha, the limit of the log-scales


class DifferNetConfig(Config):
    """Settings of DifferNet."""

    levels: tuple[str, ...] | None = Field(None, description="backbone levels; those at 1/8, 1/16 and 1/32 if unset")
    deepest: bool = Field(False, description="where levels are unset, the last one alone")
    rotations: int = Field(4, ge=1, le=64, description="angles at which an image is seen, evenly spaced")
    step_rotations: int = Field(
        0, ge=0, le=64, description="of these angles, so many are drawn for each image and step; 0: all"
    )
    scales: int = Field(3, ge=1, le=8, description="sizes at which it is seen, each half of the one before")
    deviations: bool = Field(True, description="vectors hold standard deviations beside the means")
    components: int = Field(
        256, ge=0, le=4096, description="principal components that the flow reads; 0: it reads the vectors"
    )
    ridge: float = Field(0.01, gt=0, le=1e6, description="variance added in every direction, of a standardised value's")
    blocks: int = Field(8, ge=1, le=64, description="permutations with a coupling each")
    hidden: int = Field(128, ge=1, le=4096, description="width of the subnets' hidden layers")
    layers: int = Field(2, ge=1, le=16, description="linear layers of a subnet")
    identity: bool = Field(True, description="couplings start as the identity")
    noise: float = Field(
        0.1, ge=0, le=1e6, description="standard deviation of what training adds to what the flow reads"
    )
    epochs: int = Field(20, ge=0, le=100_000, description="passes over the training images")
    batch_size: int = Field(24, ge=1, le=4096, description="images in a step, each at all its angles")
    learning_rate: float = Field(2e-4, gt=0, le=1e6, description="of Adam")
    weight_decay: float = Field(1e-5, ge=0, le=1e6, description="of Adam")
    sigma: float = Field(3.0, ge=0, le=1000, description="Gaussian smoothing of the gradient map, in input pixels")


class DifferNet(Method):
    """See the module's docstring."""

    Config = DifferNetConfig
    presets: ClassVar[dict[str, Preset]] = read_presets("differnet")
    localises: ClassVar[bool] = False
    optimises: ClassVar[bool] = True
    pools: ClassVar[bool] = True
    config: DifferNetConfig

    def __init__(self, config: DifferNetConfig, backbone: Backbone, size: tuple[int, int]) -> None:
        super().__init__(config, backbone, size)
        self.width = sum(backbone.channels) * config.scales * (1 + config.deviations)  # D
        self.read = min(config.components or self.width, self.width)  # K
        self.flow = flow(config, self.read)
        if config.components:
            self.register_buffer("mean", torch.zeros(self.width))
            self.register_buffer("scale", torch.ones(self.width))
            self.register_buffer("axes", torch.zeros(self.width, self.read))
            self.register_buffer("variances", torch.ones(self.read))
            self.register_buffer("outside", torch.ones(()))
            self.mean: Tensor
            self.scale: Tensor
            self.axes: Tensor
            self.variances: Tensor
            self.outside: Tensor  # variance in each direction outside the components
        self.smooth = Enlarge(size, size, config.sigma)

    @classmethod
    def resolved(cls, config: DifferNetConfig, backbone: str) -> DifferNetConfig:
        if config.levels:
            return config
        levels = levels_at(backbone, (8, 16, 32))
        return config.model_copy(update={"levels": levels[-1:] if config.deepest else levels})

    @classmethod
    def extractor(cls, config: DifferNetConfig, backbone: Backbone, size: tuple[int, int]) -> nn.Module:
        return Pyramid(backbone, rotations=config.rotations, scales=config.scales, deviations=config.deviations)

    def vectors(self, features: list[Tensor]) -> Tensor:
        """Maps (B, C_i, R, 1) -> (B R, D): y, an image's vector at each angle."""
        return torch.cat(features, 1).squeeze(3).transpose(1, 2).reshape(-1, self.width)

    def reduced(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) -> whitened components (N, K), and the squared length (N,) of what lies outside them, whitened too."""
        if not self.config.components:
            return vectors, torch.zeros_like(vectors[:, 0])
        standard = (vectors - self.mean) * self.scale
        components = standard @ self.axes
        rest = (standard - components @ self.axes.T).square().sum(1)
        return components * self.variances.rsqrt(), rest / self.outside

    def stages(self, images: int) -> Iterator[Stage]:
        self.flow = flow(self.config, self.read).to(next(self.flow.parameters()).device)  # drawn anew from the seed
        if self.config.components:
            yield self._principal_components(images)
        if self.config.epochs:
            yield Optimise(
                "flow",
                self.loss,
                list(self.flow.parameters()),
                self.config.epochs,
                self.config.batch_size,
                lambda parameters: torch.optim.Adam(
                    parameters,
                    self.config.learning_rate,
                    betas=(0.8, 0.8),
                    eps=1e-4,
                    weight_decay=self.config.weight_decay,
                ),
            )

    def _principal_components(self, images: int) -> Collect:
        """Those of standardised vectors of all images, or of some where there are many."""
        share = _VECTORS / (images * self.config.rotations)
        sample: list[Tensor] = []

        def update(features: list[Tensor], inside: Tensor | None) -> None:
            vectors = self.vectors(features)
            sample.append(vectors[torch.rand(len(vectors)) < share])

        def close(progress: Callable[[int, int], None]) -> None:
            vectors = torch.cat(sample)
            std, mean = torch.std_mean(vectors, 0, correction=0)
            self.mean.copy_(mean)
            self.scale.copy_(1 / std.clamp_min(1e-2 * float(std.mean())))
            _, singular, axes = torch.linalg.svd((vectors - self.mean) * self.scale, full_matrices=False)
            variances = singular.square() / len(vectors)
            found = min(self.read, len(variances))  # fewer vectors than components leave the others zero
            self.axes.zero_()[:, :found] = axes[:found].T
            self.variances.fill_(1)[:found] = variances[:found] + self.config.ridge
            self.outside.fill_(float(variances[found:].sum()) / max(1, self.width - found) + self.config.ridge)
            progress(1, 1)

        rows = min(_VECTORS, images * self.config.rotations)
        return Collect("principal components", update, close, peak_bytes=4 * 5 * rows * self.width)

    def loss(self, features: list[Tensor], inside: Tensor | None) -> Tensor:
        """The negative log-likelihood (Eq. 4 without its constant) for each dimension, mean over images and angles."""
        y, _ = self.reduced(self.vectors(self._seen(features)))
        if self.config.noise:
            y = y + self.config.noise * torch.randn(y.shape).to(y)
        z, log_det = self.flow(y)
        likelihood: Tensor = (log_det - z.square().sum(1) / 2).mean()
        return -likelihood / self.read

    def _seen(self, features: list[Tensor]) -> list[Tensor]:
        """The maps (B, C_i, R, 1) at as many of their angles as a step sees."""
        angles, seen = self.config.rotations, self.config.step_rotations
        if not seen or seen >= angles:
            return features
        drawn = torch.rand(len(features[0]), angles).topk(seen, dim=1).indices.to(features[0].device)  # (B, S)
        return [level.gather(2, drawn[:, None, :, None].expand(-1, level.shape[1], -1, 1)) for level in features]

    def score(self, features: list[Tensor], inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """There is no map: each of its places holds the score."""
        y, outside = self.reduced(self.vectors(features))
        z, _ = self.flow(y)
        unlikely = (z.square().sum(1) + outside) / (2 * self.width)  # (B R,): -log p_Z for each dimension
        scores = unlikely.view(-1, self.config.rotations).mean(1)  # Eq. 6
        return scores.view(-1, 1, 1, 1), scores

    def enlarge(self, anomaly_map: Tensor, inside: Tensor | None = None) -> Tensor:
        return anomaly_map.expand(-1, -1, *self.size)

    def gradient_map(self, images: Tensor, inside: Tensor | None = None) -> Tensor:
        """On which pixels the score depends: images (B, 3, H, W), as the backbone takes them -> (B, 1, H, W) >= 0.

        The gradient of the score with respect to the image, smoothed, its magnitude summed over the channels (Eq. 7).
        Gradients of all angles come turned back and averaged. It is no anomaly map: a good image has one as well.
        """
        images = images.detach().clone().requires_grad_()
        with torch.enable_grad():
            _, scores = self.score(self.features(images, inside), inside)
            (gradient,) = torch.autograd.grad(scores.sum(), images)  # (B, 3, H, W)
        smoothed: Tensor = self.smooth(gradient)
        return smoothed.abs().sum(1, keepdim=True)


def flow(config: DifferNetConfig, channels: int) -> Flow:
    """Fixed random permutations, each with a coupling that changes both halves (Section 3.2)."""
    subnet = mlp(config.hidden, layers=config.layers, zero=config.identity)
    blocks: list[Block] = []
    for _ in range(config.blocks):
        coupling = Coupling(channels, subnet, two_sided=True, clamp="atan", bound=_BOUND)
        blocks += [Mixing(channels, "permutation"), coupling]
    return Flow(blocks)
