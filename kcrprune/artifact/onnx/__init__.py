"""ONNX graphs: written and compared with PyTorch, read back and run."""

from kcrprune.artifact.onnx.export import ExportResult, export_onnx
from kcrprune.artifact.onnx.open import OnnxModel, open_onnx
from kcrprune.artifact.onnx.record import GraphRecord, metadata_of

__all__ = ["ExportResult", "GraphRecord", "OnnxModel", "export_onnx", "metadata_of", "open_onnx"]
