"""The command line: verbs, exit codes, and how soon it answers."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bksdm_tune import __version__, cli
from bksdm_tune.errors import DataError, UsageError

VERBS = (
    "backbones",
    "build",
    "data",
    "cache",
    "distill",
    "subjects",
    "dreambooth",
    "generate",
    "attention",
    "evaluate",
    "score",
    "sweep",
    "compare",
    "export",
    "adapter",
    "port",
    "push",
    "app",
    "doctor",
)

# What stays in the buffer meets the closed pipe or the full disk only at exit.
BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}

# Runs the command in a fresh interpreter and says which heavy modules it loaded.
LOADED = """
import sys
from bksdm_tune.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print("LOADED", *sorted({"torch", "diffusers", "transformers", "tyro"} & sys.modules.keys()))
sys.exit(code)
"""

STUB = """
import sys
from types import SimpleNamespace
from bksdm_tune import cli
def main(argv):
    {body}
sys.modules["stub"] = SimpleNamespace(main=main)
cli.VERBS = (cli.Verb("stub", "stub", "for a test"),)
sys.argv = ["bksdm-tune", "stub"]
cli.entry()
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def loaded(stdout: str) -> list[str]:
    return stdout.splitlines()[-1].split()[1:]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``stub(main)`` makes ``main`` the only verb, called "stub"."""

    def install(main: Any) -> None:
        monkeypatch.setitem(sys.modules, "stub", SimpleNamespace(main=main))
        monkeypatch.setattr(cli, "VERBS", (cli.Verb("stub", "stub", "for a test"),))

    return install


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("  ")] == [*VERBS]


def test_help_loads_nothing_heavy() -> None:
    done = python("-c", LOADED, "--help")
    assert done.returncode == 0
    assert loaded(done.stdout) == []


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_loads_only_the_parser(verb: str) -> None:
    done = python("-c", LOADED, verb, "--help")
    assert done.returncode == 0, done.stderr
    assert f"bksdm-tune {verb}" in done.stdout
    assert set(loaded(done.stdout)) <= {"tyro"}


def test_the_module_runs_as_the_command() -> None:
    done = python("-m", "bksdm_tune", "--version")
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n")


def test_no_verb_prints_the_usage_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("usage: bksdm-tune VERB")


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dreamboth"]) == 2
    assert "'dreamboth': did you mean dreambooth?" in capsys.readouterr().err
    assert cli.main(["zzz"]) == 2
    assert "choose from backbones, build," in capsys.readouterr().err


def test_a_verb_gets_its_arguments_and_gives_the_exit_code(stub: Any) -> None:
    got: list[list[str]] = []

    def main(argv: list[str]) -> int:
        got.append(argv)
        return 7

    stub(main)
    assert cli.main(["stub", "--steps", "3"]) == 7
    assert got == [["--steps", "3"]]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("--steps must be 1 or more."), 2, "--steps must be 1 or more."),
        (DataError("a.png is truncated."), 3, "a.png is truncated."),
        (KeyboardInterrupt(), 130, "interrupted."),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            3,
            "disk full at runs/x: free some space, then repeat.",
        ),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            3,
            "disk full: free some space, then repeat.",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 3, "/x: Permission denied."),
    ],
)
def test_what_the_user_caused_is_one_line(
    stub: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def main(argv: list[str]) -> int:
        raise error

    stub(main)
    monkeypatch.setattr(cli, "silence", lambda stream: None)  # pytest needs its stdout
    assert cli.main(["stub"]) == code
    assert capsys.readouterr().err == f"bksdm-tune: {message}\n"


@pytest.mark.parametrize("error", [ValueError("ours"), OSError(errno.EACCES, "no"), SystemExit(2)])
def test_everything_else_passes(stub: Any, error: BaseException) -> None:
    def main(argv: list[str]) -> int:
        raise error

    stub(main)
    with pytest.raises(type(error)):
        cli.main(["stub"])


def test_wrong_flags_exit_2() -> None:
    done = python("-m", "bksdm_tune", "doctor", "--jsn")
    assert done.returncode == 2
    assert "--jsn" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_130_and_one_line(number: signal.Signals) -> None:
    body = "print('ready', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", STUB.format(body=body)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "bksdm-tune: interrupted.\n"


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_reader_that_leaves_is_no_error(size: int) -> None:
    body = f"print('x' * {size}); return 0"
    command = [sys.executable, "-c", STUB.format(body=body)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=BUFFERED) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_under_the_output_exits_3() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "bksdm_tune", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=BUFFERED,
        )
    assert done.returncode == 3
    assert done.stderr == "bksdm-tune: disk full: free some space, then repeat.\n"


def test_the_table_is_what_the_readme_promises() -> None:
    assert tuple(verb.name for verb in cli.VERBS) == VERBS
    for verb in cli.VERBS:
        assert callable(importlib.import_module(verb.module).main)


def test_the_end_tidies_up_but_takes_nothing_apart() -> None:
    lines = (
        "import atexit, sys",
        "from bksdm_tune import cli",
        "class Library:",
        "    def __del__(self):",
        "        print('taken apart')",
        "kept = Library()",
        "def main(argv):",
        "    atexit.register(print, 'tidied up')",
        "    sys.stdout.write('done ')",
        "    return 3",
        "cli.main = main",
        "cli.entry()",
    )
    done = python("-c", "\n".join(lines))
    assert (done.returncode, done.stdout, done.stderr) == (3, "done tidied up\n", "")
