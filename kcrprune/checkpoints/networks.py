"""Which of timm's networks can be cut: a table, networks.json, that `python docs/networks.py` writes."""

import json
from importlib.resources import files

from kcrprune.measure.report import Network


def networks() -> tuple[Network, ...]:
    """Every network of the timm that the table was made with, by name."""
    rows = json.loads(files("kcrprune.checkpoints").joinpath("networks.json").read_text("utf-8"))
    return tuple(Network(**row) for row in rows)
