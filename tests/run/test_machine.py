"""What a run tells of itself and its machine."""

import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from kcrprune.run.machine import peak_memory_mib


def test_the_peak_of_the_memory_never_falls():
    before = peak_memory_mib()
    assert psutil.Process().memory_info().rss / 2**20 <= before * 1.01
    torch.ones(2**25).sum()  # 128 MiB
    assert peak_memory_mib() >= before


def test_windows_tells_its_own_peak(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Windows")
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(peak_wset=3 * 2**20))
    assert peak_memory_mib() == pytest.approx(3)
