"""Pretrained feature extractors: any timm model, cut off after the deepest level that is read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flawmap.backbones.catalogue import DEFAULT_BACKBONE
from flawmap.backbones.networks import create_network, default_levels, level_names
from flawmap.backbones.weights import load_embedded, network_from_file, network_from_hub, weights_digest
from flawmap.errors import FlawmapError

# The maps of a forward pass that is under way, for each thread its own: a module shared by threads keeps none.
_maps: ContextVar[dict[str, Tensor]] = ContextVar("maps")


class _DeepestLevelReached(Exception):
    pass


class Backbone(nn.Module):
    """A pretrained network that returns the maps of some of its levels.

    Built by `create_backbone`. What lies behind the deepest level is neither kept nor run, so parameters, state and
    digest are those of the trunk alone.

    Attributes:
        name: the timm name.
        levels: names of modules, in the order in which `forward` returns their outputs.
        channels, reductions: of each level; the reduction is the input size over the map size.
        mean, std: what the weights expect of images in [0, 1].
    """

    def __init__(self, name: str, network: nn.Module, levels: Sequence[str], size: tuple[int, int]) -> None:
        super().__init__()
        self.name = name
        self.network = network
        self.levels = tuple(levels)
        cfg: dict[str, Any] = getattr(network, "pretrained_cfg", {})
        self.mean: tuple[float, ...] = tuple(cfg["mean"])
        self.std: tuple[float, ...] = tuple(cfg["std"])
        modules = dict(network.named_modules())
        unknown = [level for level in self.levels if level not in modules]
        if unknown or not self.levels:
            raise FlawmapError(
                f"backbone {name} has no level {', '.join(unknown) or '(none given)'}: "
                f"choose from {', '.join(level_names(network))}"
            )
        for level in self.levels:
            # Not a closure: a copy of this module has to keep maps of its own.
            modules[level].register_forward_hook(partial(self._keep, level))
        device = next(network.parameters()).device
        maps = self._prune(torch.zeros(1, 3, *size, device=device))
        self.channels = tuple(m.shape[1] for m in maps)
        self.reductions = tuple(size[0] / m.shape[2] for m in maps)

    def _keep(self, level: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        maps = _maps.get()
        maps[level] = output
        if len(maps) == len(self.levels):
            raise _DeepestLevelReached

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) float32, normalised -> one map (B, C_l, H_l, W_l) for each level."""
        maps: dict[str, Tensor] = {}
        reading = _maps.set(maps)
        try:
            with suppress(_DeepestLevelReached):
                self.network(images)
        finally:
            _maps.reset(reading)
        return [self._as_map(maps[level], images) for level in self.levels]

    def _as_map(self, output: Tensor, images: Tensor) -> Tensor:
        if output.ndim == 4:
            return output.permute(0, 3, 1, 2) if getattr(self.network, "output_fmt", "NCHW") == "NHWC" else output
        patches: Any = self.network.patch_embed  # transformer tokens: (B, prefix + h*w, C)
        h, w = images.shape[-2] // patches.patch_size[0], images.shape[-1] // patches.patch_size[1]
        tokens = output[:, output.shape[1] - h * w :]
        return tokens.transpose(1, 2).reshape(output.shape[0], output.shape[2], h, w)

    @torch.no_grad()
    def _prune(self, example: Tensor) -> list[Tensor]:
        """Replaces what a run does not reach by identities, so that it is neither stored nor counted."""
        reached: set[nn.Module] = set()
        # Not only leaves: timm's normalisations hold both parameters and an activation.
        modules = self.network.named_modules()
        holders = {n: m for n, m in modules if n and any(True for _ in m.parameters(recurse=False))}
        handles = [m.register_forward_pre_hook(lambda module, _: reached.add(module)) for m in holders.values()]
        self.network.eval()
        maps: list[Tensor] = self(example)
        for handle in handles:
            handle.remove()
        for name, holder in reversed(holders.items()):
            if holder not in reached:
                self.network.set_submodule(name, nn.Identity())
        return maps

    @property
    def medium(self) -> list[int]:
        """Positions of the levels at 1/8 and 1/16 of the input, or of all where there are none.

        Averaged over an image they tell what is in it: a defect moves them little, and another part far.
        """
        return [i for i, factor in enumerate(self.reductions) if factor in (8, 16)] or list(range(len(self.levels)))

    def digest(self) -> str:
        """`weights_digest` of the trunk."""
        return weights_digest(self)

    def macs(self, size: tuple[int, int]) -> int:
        """Multiply-accumulates of one image of `size` (height, width), as PyTorch's own counter sees them."""
        from torch.utils.flop_counter import FlopCounterMode

        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            self(torch.zeros(1, 3, *size, device=next(self.parameters()).device))
        return counter.get_total_flops() // 2


def create_backbone(
    name: str = DEFAULT_BACKBONE,
    levels: Sequence[str] | None = None,
    *,
    weights: str | Path | None = None,
    size: tuple[int, int] = (256, 256),
    seed: int = 0,
) -> Backbone:
    """A backbone with its weights, frozen and in evaluation mode.

    Args:
        name: any timm model with intermediate features.
        levels: names of its modules whose outputs are read; `default_levels(name)` where None.
        weights: a local .safetensors, .pth or .pt file; "random" (drawn from `seed`, for tests only); None takes the
            embedded weights of the default backbone, else timm's hub.
        size: the input size (height, width) it will be used at.

    Raises:
        FlawmapError: unknown name or level, a size it cannot take, or weights that cannot be had.
    """
    levels = default_levels(name) if levels is None else levels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if weights == "random":
            network = create_network(name, size)
        elif weights is not None:
            network = network_from_file(name, size, Path(weights))
        elif name == DEFAULT_BACKBONE:
            network = create_network(name, size)
            load_embedded(network)
        else:
            network = network_from_hub(name, size)
        return Backbone(name, network, levels, size).eval().requires_grad_(False)
