"""ONNX graphs: written and compared with PyTorch, read back and run."""

from kcrprune.graphs.export import ExportResult, export_onnx
from kcrprune.graphs.open import OnnxModel, open_onnx
from kcrprune.graphs.record import GraphRecord, metadata_of

__all__ = ["ExportResult", "GraphRecord", "OnnxModel", "export_onnx", "metadata_of", "open_onnx"]
