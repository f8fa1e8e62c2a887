"""A detector of the lab as one ONNX file of the line, which proves itself before it takes its name."""

from flawmap.export.exporting import Exported, export
from flawmap.export.proof import Proof

__all__ = ["Exported", "Proof", "export"]
