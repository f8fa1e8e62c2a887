"""Settings that papers choose on test labels, chosen on synthetic defects in good images instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from flawmap.datasets import Dataset
from flawmap.datasets.sources import source_name, training_paths
from flawmap.detector import Detector
from flawmap.errors import FlawmapError
from flawmap.imaging.image_files import digest
from flawmap.learning.data import Progress, quiet
from flawmap.learning.fitting import SHORT
from flawmap.text import counted
from flawmap.tuning.criterion import Compared
from flawmap.tuning.live_points import compare_live, live_figures, live_points
from flawmap.tuning.oracle import OracleGrid, test_samples
from flawmap.tuning.outcome import Tuning
from flawmap.tuning.sweep import Sweep, labelled
from flawmap.tuning.synthetic import DEFECTS, FEWEST, synthetic_images

_ENOUGH = 20  # good images to tune on


def tune(
    detector: Detector,
    source: str | Path | Dataset | Sequence[str | Path],
    *,
    grid: Mapping[str, Sequence[float]] | None = None,
    category: str | None = None,
    seed: int = 0,
    oracle: bool = False,
    progress: Progress = quiet,
) -> tuple[Detector, Tuning]:
    """Chooses the settings that can still be moved on synthetic defects, made from good images not fitted on.

    If `source` holds at least 20 good images that the detector has never seen, it is tuned on those. Else half of those
    it was calibrated on serve, and the other half calibrates what is returned. What has to be fitted anew to be changed
    is chosen by `flawmap.tuning.refitting.tune_fit`.

    Args:
        detector: a fitted one.
        source: the good images, as for `Detector.fit`.
        grid: values to try of some settings; every other one of the paper's by default. What is set is tried as well.
        category: of a data set root.
        seed: of the defects, of the split and of the bootstrap.
        oracle: also measure every point on the labelled test images of `source`, a folder or a `Dataset`.
        progress: is told how it goes.

    Raises:
        FlawmapError: no setting can be moved, a value is not valid, too few good images are left, or there are no
            labelled test images for `oracle`.
    """
    detector.check_live()
    if detector.latents_ is None:
        raise FlawmapError(
            "all good images were learnt from, none is left to tune on: train without --calibration none"
        )
    method, preparation = detector.method_, detector.preparation_
    # Before anything is computed.
    detector.moved_config({name: values[0] for name, values in (grid or {}).items() if values})
    points = live_points(type(method), method.config, grid or {})
    samples = test_samples(source, category) if oracle else []
    fitted, calibrating = set(detector.training_["fitted"]), list(dict.fromkeys(detector.latents_.digests))
    held_out: dict[str, Path] = {}
    new: dict[str, Path] = {}
    for path in training_paths(source, category):
        kept = digest(path)
        if kept[:SHORT] not in fitted:
            (held_out if kept in calibrating else new).setdefault(kept, path)
    chosen = new
    if len(new) < _ENOUGH:
        order = np.random.default_rng(seed).permutation(len(held_out))
        half = {list(held_out)[i] for i in order[: len(held_out) // 2]}
        chosen = {kept: path for kept, path in held_out.items() if kept in half}
        calibrating = [kept for kept in calibrating if kept not in half]
    if len(chosen) < FEWEST:
        raise FlawmapError(
            f"{counted(len(chosen), 'good image')} of {source_name(source)} left to tune on, "
            f"beside those that were fitted and those that have to calibrate: give at least {FEWEST} more"
        )
    images = synthetic_images(list(chosen.values()), preparation, seed, method.trained_on)
    shared = (preparation, detector.extraction_engine(), detector.device, progress)
    with Sweep(method, images, len(chosen) * (1 + DEFECTS), *shared) as sweep:
        compared = Compared(points, *compare_live(method, sweep, points, progress), sweep.labels)
    figures = None
    if samples:
        with Sweep(method, (labelled(sample) for sample in samples), len(samples), *shared) as sweep:
            figures = OracleGrid(points, live_figures(method, sweep, points, progress))
    tuning = compared.tuning(points[0], seed, figures)
    other = detector.with_settings(calibrate=False, **tuning.chosen)
    other.latents_ = detector.latents_.only(set(calibrating))
    other.training_ = {**detector.training_, "tuned": {**tuning.chosen, "images": tuning.images, "seed": seed}}
    return other.calibrate(), tuning
