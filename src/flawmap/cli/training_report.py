"""What training says of its result: in a few lines, and on the page beside the model file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flawmap.datasets import Dataset
    from flawmap.detector import Detector
    from flawmap.judging.inspection import Inspection
    from flawmap.learning.fitting import Atypical

_SHOWN = 12  # atypical images on the page


def threshold_lines(detector: Detector) -> list[str]:
    """The threshold kept, which image sets the conformal one, and where the other one would lie, in a line each."""
    from flawmap.errors import FlawmapError
    from flawmap.report.wording import short_path

    rate, tail = detector.max_false_reject, detector.guarantee == "tail"
    calibration, threshold = detector.calibration_, detector.threshold_
    if calibration is None or threshold is None:
        return [detector.inspector().judge.describe()]
    lines = [threshold.describe()]
    if tail:
        lines.append(f"not used: {calibration.threshold(rate).describe_again()}")
    decisive = calibration.decisive(rate, "marginal" if tail else detector.guarantee)
    if decisive is not None:
        paths = [one.path for one in detector.atypical_ if one.score == decisive.score]
        lines.append(
            f"the {'conformal ' if tail else ''}threshold is set by {short_path(paths[0]) if paths else 'one image'} "
            f"(score {decisive.score:.6g}); without it it would be {decisive.without:.6g}"
        )
    if not tail:
        try:
            other = calibration.threshold(rate, "tail")
            text = other.describe() if threshold.promises else other.describe_again()
            lines.append(f"not used, --tail keeps it: {text}")
        except FlawmapError as refusal:
            lines.append(f"no threshold from the tail: {refusal}")
    return lines


def notes(detector: Detector, updated: bool) -> list[str]:
    """What the user should know of the images, in a line each."""
    from flawmap.text import counted

    if updated:
        return []
    told = []
    if detector.atypical_:
        most = ", ".join(f"{one.path.name} ({one.score:.4g})" for one in detector.atypical_[:3])
        images, them = ("image", "it") if len(detector.atypical_) == 1 else ("images", "them")
        told.append(f"most unusual good {images}: {most}; look at {them} in the report, --drop-atypical N leaves N out")
    if detector.near_duplicates_:
        count = sum(len(group) - 1 for group in detector.near_duplicates_)
        copies, they = counted(count, "image shows", "images show"), "it adds" if count == 1 else "they add"
        told.append(
            f"{copies} what another one shows (see the report): {they} little, and the rate above holds only for parts "
            "as alike"
        )
    return told


def _unlearnt(one: Atypical, inspection: Inspection) -> Inspection:
    """What the method that had not learnt the image says of it; without a map where that was not kept whole."""
    from dataclasses import replace

    if one.maps is None or inspection.maps is None or inspection.threshold is None:
        return replace(inspection, maps=None)
    return replace(
        inspection,
        verdict="defect" if one.score >= inspection.threshold else "good",
        score=one.score,
        p_value=one.p_value,
        maps=one.maps if one.maps.shape == inspection.maps.shape else None,
    )


def write_findings(path: Path, detector: Detector) -> None:
    """What training found, in JSON."""
    import json
    import os

    from flawmap.files import replacing

    threshold = detector.threshold_
    content = {
        "method": detector.method,
        "threshold": None if threshold is None else threshold.value,
        "false_reject_rate": None if threshold is None else threshold.rate,
        "guarantee": None if threshold is None else threshold.guarantee,
        "told": "" if threshold is None else threshold.describe(),
        "unusual": [
            {"path": os.fspath(one.path), "score": one.score, "p_value": one.p_value} for one in detector.atypical_
        ],
        "left_out": [str(error) for error in detector.left_out_],
    }
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def write_report(path: Path, detector: Detector, dataset: Dataset) -> None:
    """The page that training ends with."""
    from flawmap.datasets.duplicates import in_train_and_test
    from flawmap.errors import ImageError
    from flawmap.imaging.decoding import read_image
    from flawmap.report.pictures import take_picture
    from flawmap.report.training_page import AtypicalPicture, Learnt, LeftOut, write_training_page

    scale = detector.heat_scale()
    unusual = detector.atypical_[:_SHOWN]
    pictures = []
    for one, inspection in zip(unusual, detector.stream([one.path for one in unusual]), strict=True):
        try:
            picture = None if scale is None else take_picture(read_image(one.path), _unlearnt(one, inspection), scale)
        except ImageError:  # gone since it was read
            picture = None
        pictures.append(AtypicalPicture(one.path, one.score, one.p_value, picture))
    left_out = []
    for error in detector.left_out_:
        name, _, reason = str(error).partition(": ")
        left_out.append(LeftOut(Path(name), reason))
    write_training_page(
        path,
        detector.settings() | {"data": dataset.name},
        Learnt(detector.sizes_, left_out, pictures, detector.near_duplicates_, in_train_and_test(dataset)),
        detector.calibration_,
        detector.threshold_,
        scale=scale,
        pixel_threshold=detector.pixel_threshold_,
        config=detector.method_.config.model_dump(mode="json"),
    )
