"""The verbs of kcrprune, each a short story told in order; computes nothing itself."""

from kcrprune.graphs import ExportResult
from kcrprune.pipeline.compress import RunResult, compress
from kcrprune.pipeline.demo import demo
from kcrprune.pipeline.verbs import Ported, evaluate, export, inspect, port, report

__all__ = ["ExportResult", "Ported", "RunResult", "compress", "demo", "evaluate", "export", "inspect", "port", "report"]
