"""Figures of how well scores and maps tell defects from good: exact functions, and a streaming twin for pixels."""

from flawmap.metrics.aupimo import aupimo
from flawmap.metrics.bootstrap import bootstrap_caught, bootstrap_intervals
from flawmap.metrics.correlation import partial_spearman, spearman
from flawmap.metrics.ranking import auroc, average_precision, f1_max, precision_recall_curve, roc_curve
from flawmap.metrics.regions import aupro, pro_curve
from flawmap.metrics.streaming import PixelCurves, PixelFigures
from flawmap.metrics.verdicts import best_escape_rate, caught_at_overkill, escape_rate, overkill_rate

__all__ = [
    "PixelCurves",
    "PixelFigures",
    "aupimo",
    "aupro",
    "auroc",
    "average_precision",
    "best_escape_rate",
    "bootstrap_caught",
    "bootstrap_intervals",
    "caught_at_overkill",
    "escape_rate",
    "f1_max",
    "overkill_rate",
    "partial_spearman",
    "precision_recall_curve",
    "pro_curve",
    "roc_curve",
    "spearman",
]
