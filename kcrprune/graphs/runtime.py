"""Which build of ONNX Runtime is here, and sessions on the device that is asked for."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import onnxruntime
import torch

from kcrprune.errors import ConfigError

PACKAGES: Final = ("onnxruntime-gpu", "onnxruntime")  # both import as onnxruntime
FATAL_ONLY: Final = 4  # ONNX Runtime's log level; what fails is raised, too


def installed() -> dict[str, str]:
    """The versions of the packages that are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def told_of_both() -> str | None:
    """The sentence for two packages that overwrite each other's files; None for one."""
    if len(found := installed()) < 2:
        return None
    names = " and ".join(f"{name} {number}" for name, number in found.items())
    return f"{names} are both installed and share a folder, so either may be broken; pip uninstall both, install one"


def session(path: Path, device: str = "cpu") -> onnxruntime.InferenceSession:
    """A session on `cpu`, `cuda` or `cuda:N`; ConfigError where ONNX Runtime gives another than the one asked for.

    It would fall back to the CPU with no more than a warning.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    options.intra_op_num_threads = torch.get_num_threads()
    kind, _, number = device.partition(":")
    name = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[kind]
    if kind == "cuda":
        _require(name in onnxruntime.get_available_providers(), device)
        onnxruntime.set_default_logger_severity(FATAL_ONLY)  # before a session there is no other way
        onnxruntime.preload_dlls()  # torch's CUDA and cuDNN, where the system has none
    found = onnxruntime.InferenceSession(
        path.resolve(),
        options,
        providers=[(name, {"device_id": int(number)})] if number else [name],
        enable_fallback=0,  # its second attempt is the same, and it prints
    )
    _require(name in found.get_providers(), device)
    return found


def _require(given: bool, device: str) -> None:  # noqa: FBT001 (read at the call)
    if not given:
        raise ConfigError(
            f"device {device!r} is asked for, and ONNX Runtime ({_named()}) gives the CPU here; use --device cpu, or "
            "install onnxruntime-gpu and the CUDA that it wants"
        )


def _named() -> str:
    return ", ".join(f"{name} {number}" for name, number in installed().items())
