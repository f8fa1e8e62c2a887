"""Folders and tables on disk, read into one table of samples."""

from flawmap.datasets.layouts import find_dataset
from flawmap.datasets.samples import Dataset, Sample

__all__ = ["Dataset", "Sample", "find_dataset"]
