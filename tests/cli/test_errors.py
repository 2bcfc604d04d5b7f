import pytest

from kcrprune import errors
from kcrprune.cli.app import run

KINDS = [errors.KcrPruneError, *errors.KcrPruneError.__subclasses__()]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_our_errors_are_one_line_and_their_exit_code(pipeline, capsys, kind):
    pipeline.fails_with = kind("vit.pth is a web page;\n  download it again")
    assert run(["compress", "vit.pth", "-q"]) == kind.exit_code
    printed = capsys.readouterr()
    assert printed.err == "error: vit.pth is a web page; download it again\n"
    assert printed.out == ""


def test_every_exit_code_has_one_meaning():
    assert len({kind.exit_code for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("compress", "error: Missing argument 'CHECKPOINT'. (see `kcrprune compress --help`)"),
        ("compress x --scores fisher", "No such option: --scores (Possible options: --ranking)"),
        ("compress x --stages=2", "No such option: --stages (Possible options: --tighten-steps)"),
        ("compres x", "error: No such command 'compres'. Did you mean 'compress'? (see `kcrprune --help`)"),
        ("report a b c", "error: Got unexpected extra argument(s) (c) (see `kcrprune report --help`)"),
        (
            "compress x --target-flops 1.5",
            "target_flops = '1.5' cannot work: input should be less than or equal",
        ),
        ("compress x --ranking taylor", "'taylor' is not one of 'auto', 'innovation', 'fisher'"),
        ("compress x --axes mlp", "error: axes = 'mlp' cannot work"),
        ("compress x --config none.toml", "error: none.toml: cannot be read (No such file or directory)"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(pipeline, capsys, words, sentence):
    assert run(words.split()) == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert printed.count("\n") == 1
    assert pipeline.asked == {}


def test_what_nobody_foresaw_is_a_sentence_too(pipeline, capsys, monkeypatch):
    pipeline.fails_with = ZeroDivisionError("division by zero")
    monkeypatch.delenv("KCRPRUNE_TRACEBACK", raising=False)
    assert run(["inspect", "x"]) == 1
    assert capsys.readouterr().err == (
        "error: unexpected ZeroDivisionError: division by zero (KCRPRUNE_TRACEBACK=1 shows where)\n"
    )


def test_the_traceback_is_there_for_who_asks(pipeline, capsys, monkeypatch):
    pipeline.fails_with = errors.DataError("no images")
    monkeypatch.setenv("KCRPRUNE_TRACEBACK", "1")
    assert run(["inspect", "x"]) == 5
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert printed.endswith("error: no images\n")


def test_the_file_system_speaks_for_itself(pipeline, capsys):
    pipeline.fails_with = OSError(28, "No space left on device", "run/model.safetensors")
    assert run(["compress", "x", "-q"]) == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'run/model.safetensors'\n"


MEMORY = [
    MemoryError("Unable to allocate 3.1 TiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
    ),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    OSError(12, "Cannot allocate memory"),
    MemoryError("Caught MemoryError in worker 0.\nTraceback (most recent call last):\n  x\nMemoryError: of numpy"),
]


@pytest.mark.parametrize("error", MEMORY, ids=str)
def test_memory_that_runs_out_is_one_sentence_with_the_way_out(pipeline, capsys, error):
    pipeline.fails_with = error
    assert run(["compress", "x", "-q"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: memory ran out (")
    assert told.endswith(
        "); give a smaller --batch-size, fewer --calibration-images, --workers 0, or a machine with more\n"
    )
    assert "Traceback" not in told


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["compress", "--help"]])
def test_questions_are_answered_with_success(capsys, words):
    assert run(words) == 0
    assert "kcrprune" in capsys.readouterr().out


@pytest.mark.parametrize(("rank", "fails"), [("0", False), ("0", True), ("1", False), ("1", True)])
def test_of_several_processes_one_prints(pipeline, capsys, monkeypatch, rank, fails):
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    pipeline.fails_with = errors.ConfigError("no") if fails else None
    assert run(["compress", "vit.pth"]) == (2 if fails else 0)
    told = capsys.readouterr()
    assert told.out == "" if fails or rank == "1" else "The run is in run" in told.out
    assert told.err == ("error: no\n" if fails and rank == "0" else "")
