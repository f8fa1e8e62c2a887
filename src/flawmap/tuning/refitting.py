"""Settings that have to be fitted anew to be changed (levels, resolution, any other), chosen without test labels."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawmap.backbones import create_backbone, levels_at
from flawmap.datasets import Dataset, Sample
from flawmap.datasets.duplicates import duplicate_groups, duplicate_pairs
from flawmap.detector import Detector, source_name, training_paths
from flawmap.errors import FlawmapError, ImageError
from flawmap.imaging.decoding import infer_white, read_image
from flawmap.imaging.fingerprints import fingerprint
from flawmap.learning.data import Announce, Progress, quiet, silent
from flawmap.learning.good_scores import calibration_images
from flawmap.learning.workspace import refuse_interrupted
from flawmap.methods import Method, method_class
from flawmap.tuning.criterion import Compared, Criterion
from flawmap.tuning.live_points import compare_live, live_figures, live_points
from flawmap.tuning.oracle import OracleGrid, test_samples
from flawmap.tuning.outcome import Point, Tuning, in_words
from flawmap.tuning.scorer import Scorer
from flawmap.tuning.sweep import Sweep, labelled
from flawmap.tuning.synthetic import DEFECTS, FEWEST, synthetic_images

log = logging.getLogger(__name__)

MOST_CANDIDATES = 12
"""Candidates that are fitted; of larger grids so many are drawn."""
_MOST_HELD_OUT = 40  # images; they carry 160 defects, which tell candidates apart well enough
_FEWEST_DIFFERENT = FEWEST + 4  # images that do not show the same
_LARGER, _MULTIPLE = 1.5, 32  # the other size of the default grid, and what its sides are multiples of


@dataclass(frozen=True)
class _Candidate:
    """Settings to fit with.

    Attributes:
        point: the grid's values, as the method's settings hold them.
        options: of `Detector`.
    """

    point: Point
    options: dict[str, Any]


def tune_fit(
    source: str | Path | Dataset | Sequence[str | Path],
    grid: Mapping[str, Sequence[Any]] | None = None,
    *,
    category: str | None = None,
    strict: bool = False,
    drop_atypical: int = 0,
    workspace: str | Path | None = None,
    resume: bool = False,
    oracle: bool = False,
    progress: Progress = quiet,
    announce: Announce = silent,
    **options: Any,
) -> tuple[Detector, Tuning]:
    """Chooses settings on synthetic defects, fitting a detector with each of them, and fits one with those chosen.

    A quarter of the good images, 4 to 40, is held out for the choice; images that show the same stand on one side.
    Defects are made in the held-out ones on their original pixels, so candidates of all sizes are shown the same ones.
    Each candidate is fitted on the other images and measured by `flawmap.tuning.criterion.Criterion`. Where a method
    would cross-fit, a fifth of those is left out here, as where it holds out: that saves five fits for each candidate.
    Settings that can be moved after fitting are searched within each candidate.

    The chosen settings are then fitted and calibrated as `Detector.fit` does, on the other images alone: what was held
    out has served the choice, so its scores would flatter a calibration.

    Args:
        source: the good images, as for `Detector.fit`.
        grid: values to try of `image_size` and of the method's settings; text is read as `Detector` reads it. What
            `options` set is tried as well. By default the given size and half as much more, and the method's own
            levels, those at 1/8 and 1/16, and those at 1/4, 1/8 and 1/16. Of more than `MOST_CANDIDATES`
            combinations so many are drawn.
        category: of a data set root.
        strict, drop_atypical, workspace, resume: as for `Detector.fit`, of the last fit. What an interruption leaves is
            that fit's; with `resume` the search before it is done once more.
        oracle: also measure every candidate on the labelled test images of `source`, a folder or a `Dataset`.
        progress, announce: are told how it goes.
        **options: as for `Detector`, the settings before tuning; `seed` also draws what is held out, the defects and
            the bootstrap.

    Returns:
        The fitted detector, whose `training_["tuned"]` says what was chosen; and what was tried.

    Raises:
        FlawmapError: an unknown setting, a value that is not valid, nothing to choose between, fewer than eight
            different good images, no labelled test images for `oracle`, or what `Detector.fit` raises.
    """
    given = Detector(**options)
    kind = method_class(given.method)
    live_grid = {name: values for name, values in (grid or {}).items() if name in kind.live}
    refitted = {name: values for name, values in (grid or {}).items() if name not in kind.live}
    moved = live_points(kind, given.config, live_grid) if kind.live else [{}]
    candidates = _candidates(given, options, refitted if grid else None)
    if len(candidates) * len(moved) < 2:
        raise FlawmapError("nothing to choose between: give --grid two values of a setting, or one other than is set")
    if workspace is not None and not resume:
        refuse_interrupted(Path(workspace))
    samples = test_samples(source, category) if oracle else []
    paths = training_paths(source, category)
    parts = _split(paths, source_name(source), given, strict, progress)
    known = calibration_images(given.calibration)
    measured: list[_Measured] = []
    held_out = parts.held_out
    for number, candidate in enumerate(candidates, start=1):
        what = f"candidate {number} of {len(candidates)}"
        progress(what, number - 1, len(candidates))
        told = _within(progress, what)
        mode = given.calibration if known else "holdout"
        fitted = Detector(**{**candidate.options, "calibration": mode}).fit(parts.fitting, progress=told)
        if number == 1:
            held_out = _placed(held_out, fitted)
        measured.append(_measure(fitted, moved, held_out, samples, told))
        del fitted  # its memory is the next one's
        means = measured[-1].values[:, measured[-1].labels].mean(1)
        best = {**candidate.point, **moved[int(means.argmax())]}
        announce(f"{what}: criterion {means.max():.3f} at {in_words(best)}")
    points = [{**candidate.point, **point} for candidate in candidates for point in moved]
    values, seen = (np.concatenate([getattr(one, of) for one in measured]) for of in ("values", "seen"))
    figures = [found for one in measured for found in one.figures]
    compared = Compared(points, values, seen, measured[0].labels)
    tuning = compared.tuning(points[0], given.seed, OracleGrid(points, figures) if oracle else None)
    candidate, live = list(product(candidates, moved))[int(tuning.values.argmax())]
    detector = Detector(**{**candidate.options, **live}).fit(
        [path for path in paths if path not in parts.left],
        strict=strict,
        drop_atypical=drop_atypical,
        workspace=workspace,
        resume=resume,
        progress=progress,
        announce=announce,
    )
    tuned = {name: list(value) if isinstance(value, tuple) else value for name, value in tuning.chosen.items()}
    detector.training_ = {**detector.training_, "tuned": {**tuned, "images": tuning.images, "seed": given.seed}}
    return detector, tuning


def _candidates(
    given: Detector, options: Mapping[str, Any], grid: Mapping[str, Sequence[Any]] | None
) -> list[_Candidate]:
    """Every combination of the grid's values that differs from the others and can be built, as given the first."""
    kind = method_class(given.method)
    known = ("image_size", *kind.Config.model_fields)
    tried = _default_grid(given, kind) if grid is None else grid
    if unknown := [name for name in tried if name not in known]:
        raise FlawmapError(f"--grid {unknown[0]}: no such setting of {given.method}; choose {', '.join(known)}")
    built: list[Any] = []  # (settings, size) of each
    found: list[_Candidate] = []
    for values in ((), *product(*tried.values())):
        own = {**options, **dict(zip(tried, values, strict=bool(values)))}
        detector = Detector(**own)
        point = {name: getattr(detector if name == "image_size" else detector.config, name) for name in tried}
        made = (kind.resolved(detector.config, detector.backbone), detector.image_size)
        if made not in built:
            built.append(made)
            found.append(_Candidate(point, own))
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


def _buildable(candidate: _Candidate, needed: bool) -> bool:
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


@dataclass(frozen=True)
class _Parts:
    """Good images: those that candidates are fitted on, and those that defects are made in, one of each content.

    `left` are held out too: the latter, and what shows the same.
    """

    fitting: list[Path]
    held_out: list[Path]
    left: set[Path]


def _split(paths: Sequence[Path], source: str, given: Detector, strict: bool, progress: Progress) -> _Parts:
    """What shows the same stands on one side; what a calibration folder shows as well is fitted on."""
    further = calibration_images(given.calibration)
    white = infer_white([*paths, *further]) or 65535
    kept, pictures = [], []
    for done, path in enumerate([*paths, *further], start=1):
        try:
            pictures.append(fingerprint(read_image(path), white))
            kept.append(path)
        except ImageError:
            if strict:
                raise
        progress("near-duplicates", done, len(paths) + len(further))
    groups = list(range(len(kept)))
    if kept:
        for alike in duplicate_groups(duplicate_pairs(np.array(pictures)), len(kept)):
            for i in alike:
                groups[i] = alike[0]
    good, calibrating = set(paths), set(further)
    apart = {group for group, path in zip(groups, kept, strict=True) if path in calibrating}
    members: dict[int, list[Path]] = {}
    for group, path in zip(groups, kept, strict=True):
        if path in good:
            members.setdefault(group, []).append(path)
    free = [group for group in members if group not in apart]
    if len(members) < _FEWEST_DIFFERENT or len(free) < FEWEST:
        raise FlawmapError(
            f"{len(members)} different good images found in {source}: at least {_FEWEST_DIFFERENT} are needed to tune, "
            f"{FEWEST} of them to make defects in, which must not be those of --calibration"
        )
    count = min(max(len(free) // 4, FEWEST), _MOST_HELD_OUT)
    chosen = [free[i] for i in sorted(np.random.default_rng(given.seed).permutation(len(free))[:count])]
    left = {path for group in chosen for path in members[group]}
    return _Parts([p for p in kept if p in good and p not in left], [members[group][0] for group in chosen], left)


def _placed(paths: Sequence[Path], detector: Detector) -> list[Path]:
    """Those on which windows can be laid.

    Raises:
        FlawmapError: they are too few.
    """
    found = []
    for path in paths:
        try:
            detector.preparation_.place(read_image(path))
            found.append(path)
        except ImageError as error:
            log.warning("left out of tuning: %s: %s", path, error)
    if len(found) < FEWEST:
        raise FlawmapError(
            f"defects can be made in {len(found)} images held out, {FEWEST} are needed: give more images"
        )
    return found


@dataclass(frozen=True)
class _Measured:
    """One candidate: `Criterion.values` at its P points, (P, N) each, and its figures there on test images, if any."""

    values: NDArray[np.float64]
    seen: NDArray[np.bool_]
    labels: list[bool]
    figures: list[dict[str, float]]


def _measure(
    detector: Detector, points: Sequence[Point], held_out: Sequence[Path], samples: Sequence[Sample], progress: Progress
) -> _Measured:
    method, preparation = detector.method_, detector.preparation_
    images = synthetic_images(held_out, preparation, detector.seed, method.trained_on)
    most = len(held_out) * (1 + DEFECTS)
    if method.live:
        shared = (preparation, detector.extraction_engine(), detector.device, progress)
        figures = []
        with Sweep(method, images, most, *shared) as sweep:
            values, seen = compare_live(method, sweep, points, progress)
            labels = sweep.labels
        if samples:
            with Sweep(method, (labelled(sample) for sample in samples), len(samples), *shared) as sweep:
                figures = live_figures(method, sweep, points, progress)
        return _Measured(values, seen, labels, figures)
    scorer, criterion = Scorer(detector.inspector()), Criterion(method.localises)
    for batch in scorer.scored(images):
        criterion.update(batch, scorer.labels)
        progress("synthetic defects", len(scorer.labels), most)
    found, shown = criterion.values(scorer.labels)
    tested = Scorer(detector.inspector())
    return _Measured(found[None], shown[None], scorer.labels, [tested.figures(samples, progress)] if samples else [])


def _within(progress: Progress, what: str) -> Progress:
    return lambda step, done, total: progress(f"{what}: {step}", done, total)
