"""timm's networks by name, and the levels that are read of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flawmap.backbones.catalogue import CATALOGUE
from flawmap.errors import FlawmapError


def create_network(name: str, size: tuple[int, int] | None = None, **options: Any) -> nn.Module:
    """A network by its timm name, for inputs of `size` (height, width) where given; `options` as timm takes them.

    Raises:
        FlawmapError: unknown name, no intermediate features, or a size it cannot take.
    """
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


def level_names(network: nn.Module) -> list[str]:
    """The levels timm names for this network, shallowest first."""
    return [info["module"] for info in network.feature_info]  # type: ignore[union-attr]


def default_levels(name: str) -> tuple[str, ...]:
    """The levels used where the user names none: the catalogue's, else those at 1/8 and 1/16 of the input."""
    return CATALOGUE[name].levels if name in CATALOGUE else levels_at(name, (8, 16))


def levels_at(name: str, reductions: Sequence[int]) -> tuple[str, ...]:
    """The levels whose maps are smaller than the input by the given factors.

    Plain transformers have one factor throughout; for them the blocks at half and three quarters of the depth.
    """
    with torch.device("meta"):
        info: Any = create_network(name).feature_info
    if len({entry["reduction"] for entry in info}) == 1:
        return tuple(dict.fromkeys((info[len(info) // 2]["module"], info[(3 * len(info)) // 4]["module"])))
    wanted = [entry["module"] for entry in info if entry["reduction"] in reductions]
    return tuple(wanted or [info[-1]["module"]])


def default_deep_levels(name: str) -> tuple[str, ...]:
    """Deeper, coarser levels that add to them, where the catalogue knows some."""
    return CATALOGUE[name].deep_levels if name in CATALOGUE else ()


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
            network = create_network(entry.name)
        parameters = sum(p.numel() for p in network.parameters())
        yield Summary(entry.name, parameters, tuple(level_names(network)), entry.origin, entry.licence, entry.used_by)
