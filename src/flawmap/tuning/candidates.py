"""Settings to fit with: every combination of a grid's values that differs from the others and can be built."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from flawmap.backbones import create_backbone, levels_at
from flawmap.detector import Detector
from flawmap.errors import FlawmapError
from flawmap.methods import Method, method_class
from flawmap.tuning.outcome import Point, in_words

log = logging.getLogger(__name__)

MOST_CANDIDATES = 12
"""Candidates that are fitted; of larger grids so many are drawn."""
_LARGER, _MULTIPLE = 1.5, 32  # the other size of the default grid, and what its sides are multiples of


@dataclass(frozen=True)
class Candidate:
    """Settings to fit with.

    Attributes:
        point: the grid's values, as the method's settings hold them.
        options: of `Detector`.
    """

    point: Point
    options: dict[str, Any]


def fit_candidates(
    given: Detector, options: Mapping[str, Any], grid: Mapping[str, Sequence[Any]] | None
) -> list[Candidate]:
    """Every combination of the grid's values that differs from the others and can be built, as given the first.

    Args:
        given: the detector before tuning, made from `options`.
        grid: values of the image size and of the method's settings; None for the default one.

    Raises:
        FlawmapError: an unknown setting, or values of a grid given that cannot be built.
    """
    kind = method_class(given.method)
    known = ("image_size", *kind.Config.model_fields)
    tried = _default_grid(given, kind) if grid is None else grid
    if unknown := [name for name in tried if name not in known]:
        raise FlawmapError(f"--grid {unknown[0]}: no such setting of {given.method}; choose {', '.join(known)}")
    built: list[Any] = []  # (settings, size) of each
    found: list[Candidate] = []
    for values in ((), *product(*tried.values())):
        own = {**options, **dict(zip(tried, values, strict=bool(values)))}
        detector = Detector(**own)
        point = {name: getattr(detector if name == "image_size" else detector.config, name) for name in tried}
        made = (kind.resolved(detector.config, detector.backbone), detector.image_size)
        if made not in built:
            built.append(made)
            found.append(Candidate(point, own))
    if len(found) > MOST_CANDIDATES:
        drawn = np.random.default_rng(given.seed).choice(len(found) - 1, MOST_CANDIDATES - 1, replace=False) + 1
        log.warning("%d of %d combinations are tried, drawn by the seed", MOST_CANDIDATES, len(found))
        found = [found[i] for i in (0, *sorted(drawn))]
    return [one for i, one in enumerate(found) if _buildable(one, needed=i == 0 or grid is not None)]


def _default_grid(given: Detector, kind: type[Method]) -> dict[str, list[Any]]:
    grid: dict[str, list[Any]] = {}
    if "levels" in kind.Config.model_fields:
        grid["levels"] = [None, *(levels_at(given.backbone, at) for at in ((8, 16), (4, 8, 16)))]
    if given.geometry.kind != "crop":  # a crop of a larger image shows less of the part
        larger = tuple(_MULTIPLE * round(_LARGER * side / _MULTIPLE) for side in given.image_size)
        grid["image_size"] = [given.image_size, larger]
    return grid


def _buildable(candidate: Candidate, needed: bool) -> bool:
    """Whether backbone and method take the settings; that they do not is raised where `needed`."""
    try:
        detector = Detector(**candidate.options)
        kind, size = method_class(detector.method), detector.geometry.input_size(detector.image_size)
        config = kind.resolved(detector.config, detector.backbone)
        backbone = create_backbone(detector.backbone, kind.levels(config), weights="random", size=size)
        kind.extractor(config, backbone, size)
        kind(config, backbone, size)
    except FlawmapError as error:
        if needed:
            raise FlawmapError(f"{in_words(candidate.point)} cannot be tried: {error}") from error
        return False
    return True
