"""What ends a command from outside: signals, wherever they arrive, and readers that go away."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from kcrprune.cli import signals
from kcrprune.cli.app import run
from kcrprune.errors import KcrPruneError
from kcrprune.events import StepDone
from tests.pipeline.test_compress import image_folder, save

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are sent as on POSIX")
NAMES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


@pytest.fixture(autouse=True)
def unignored():
    """Whoever runs the tests may have them ignore some: a shell in the background SIGINT, nohup SIGHUP."""
    usual = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL}
    before = {name: signal.signal(getattr(signal, name), usual[name]) for name in NAMES}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


def send(name):
    os.kill(os.getpid(), getattr(signal, name))
    time.sleep(1)  # it is raised before this has ended


@pytest.fixture
def doing(pipeline, monkeypatch):
    """Has `compress` do something else."""
    return lambda action: monkeypatch.setattr(pipeline, "compress", lambda *args, **kwargs: action(args[3]))


def swallow(listener, name):
    with suppress(BaseException):  # as some libraries do while they are imported
        send(name)
    listener(StepDone("load", 1))


def convert(_listener, name):
    try:
        send(name)
    except KeyboardInterrupt:
        raise RuntimeError("a worker exited unexpectedly") from None


WAYS = {
    "plainly": lambda _, name: send(name),
    "swallowed": swallow,
    "made another error": convert,
    "swallowed at the end": lambda _, name: swallow(lambda event: None, name),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "code"), NAMES.items())
def test_each_ends_the_command_with_its_code_and_one_line(doing, capsys, way, name, code):
    before = [signal.getsignal(getattr(signal, each)) for each in NAMES]
    doing(lambda listener: WAYS[way](listener, name))
    with signals.heeded():
        assert run(["compress", "x"]) == code
    assert capsys.readouterr().err == f"stopped by {name}\n"
    assert [signal.getsignal(getattr(signal, each)) for each in NAMES] == before
    with signals.heeded():
        assert not signals.received()


def test_what_the_process_was_told_to_ignore_is_ignored(doing):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        doing(lambda _: send("SIGHUP") or (_ for _ in ()).throw(KcrPruneError("it went on")))
        with signals.heeded():
            assert run(["compress", "x"]) == 1
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_the_command_line_itself_is_imported():
    command = [sys.executable, "-v", "-m", "kcrprune", "inspect", "x"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "import 'pydantic" in line:
                break
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
    assert process.returncode == 130
    assert "stopped by SIGINT" in told.splitlines()
    assert "Traceback" not in told


def test_an_interrupt_that_leaves_an_exec_ends_with_its_own_code_under_python_m(tmp_path):
    (tmp_path / "stopped.py").write_text(
        "import signal, sys\n"
        "from kcrprune.cli import signals\n"
        "with signals.heeded():\n"
        "    try:\n"
        "        exec('signal.raise_signal(signal.SIGTERM)')\n"
        "    except KeyboardInterrupt:\n"
        "        code = signals.told()\n"
        "sys.exit(code)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-m", "stopped"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"},
    )
    assert (ended.returncode, ended.stderr) == (143, "stopped by SIGTERM\n")


def test_ctrl_c_ends_the_processes_that_load_images_as_well(tiny_vit, tmp_path):
    """A terminal sends it to all of them at once."""
    checkpoint = save(tiny_vit, tmp_path / "dense.safetensors")
    command = [sys.executable, "-m", "kcrprune", "compress", str(checkpoint), "--out", str(tmp_path / "run")]
    command += ["--data", str(image_folder(tmp_path / "images")), "--workers", "2", "--batch-size", "8"]
    command += ["--target-flops", "0.8", "--ranking", "fisher", "--no-refit", "--no-balance"]
    command += ["--search-steps", "0", "--recover-steps", "3000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("recover, "):
                break
        time.sleep(1)  # in which its workers load
        os.killpg(process.pid, signal.SIGINT)
        told = process.stderr.read()
    assert process.returncode == 130
    assert told.splitlines()[-1] == "stopped by SIGINT"
    assert "Traceback" not in told
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
