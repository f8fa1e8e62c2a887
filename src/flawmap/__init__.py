"""Industrial visual anomaly detection: learns from good images alone what a good part looks like."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flawmap.datasets import Dataset, find_dataset
    from flawmap.detector import Detector
    from flawmap.errors import FlawmapError, ImageError
    from flawmap.imaging.decoding import read_image
    from flawmap.imaging.image_files import find_images
    from flawmap.judging.calibration import Calibration, Threshold
    from flawmap.judging.evaluation import EvaluationReport
    from flawmap.judging.inspection import Inspection, Region
    from flawmap.line import Inspector

# PyTorch's and NumPy's waiting threads would otherwise spin on the cores that the next library is about to use. A short
# spin, not none: waking a sleeping thread for each small operation makes PaDiM five times slower. Both are read when
# those libraries load, so they work where flawmap is imported first.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

_PLACES = {
    "Calibration": "judging.calibration",
    "Dataset": "datasets",
    "Detector": "detector",
    "EvaluationReport": "judging.evaluation",
    "FlawmapError": "errors",
    "ImageError": "errors",
    "Inspection": "judging.inspection",
    "Inspector": "line",
    "Region": "judging.inspection",
    "Threshold": "judging.calibration",
    "find_dataset": "datasets",
    "find_images": "imaging.image_files",
    "read_image": "imaging.decoding",
}

__all__ = [
    "Calibration",
    "Dataset",
    "Detector",
    "EvaluationReport",
    "FlawmapError",
    "ImageError",
    "Inspection",
    "Inspector",
    "Region",
    "Threshold",
    "find_dataset",
    "find_images",
    "read_image",
]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; `flawmap --help` must not.
    if name == "__version__":
        from importlib.metadata import version

        return version("flawmap")
    if name in _PLACES:
        return getattr(import_module(f"flawmap.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
