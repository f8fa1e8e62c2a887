"""Settings that have to be fitted anew to be changed (levels, resolution, any other), chosen without test labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawmap.datasets import Dataset, Sample
from flawmap.datasets.sources import source_name, training_paths
from flawmap.detector import Detector
from flawmap.errors import FlawmapError
from flawmap.learning.data import Announce, Progress, quiet, silent
from flawmap.learning.good_scores import calibration_images
from flawmap.learning.workspace import refuse_interrupted
from flawmap.methods import method_class
from flawmap.tuning.candidates import fit_candidates
from flawmap.tuning.criterion import Compared, Criterion
from flawmap.tuning.held_out import hold_out, placed
from flawmap.tuning.live_points import compare_live, live_figures, live_points
from flawmap.tuning.oracle import OracleGrid, test_samples
from flawmap.tuning.outcome import Point, Tuning, in_words
from flawmap.tuning.scorer import Scorer
from flawmap.tuning.sweep import Sweep, labelled
from flawmap.tuning.synthetic import DEFECTS, synthetic_images


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
            levels, those at 1/8 and 1/16, and those at 1/4, 1/8 and 1/16. Of more than `candidates.MOST_CANDIDATES`
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
    candidates = fit_candidates(given, options, refitted if grid else None)
    if len(candidates) * len(moved) < 2:
        raise FlawmapError("nothing to choose between: give --grid two values of a setting, or one other than is set")
    if workspace is not None and not resume:
        refuse_interrupted(Path(workspace))
    samples = test_samples(source, category) if oracle else []
    paths = training_paths(source, category)
    parts = hold_out(paths, source_name(source), given, strict, progress)
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
            held_out = placed(held_out, fitted)
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
    candidate, live = list(product(candidates, moved))[points.index(tuning.chosen)]
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
