"""The command line: a table of verbs, each imported only when it runs, and the exit codes.

Exit 0 done, 2 usage, 3 bad data or a full disk, 4 scored in part, 5 unlike protocols,
130 interrupted.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import errno
import gc
import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import NamedTuple, NoReturn, TextIO

from bksdm_tune import __version__
from bksdm_tune.errors import DataError, ProtocolError, UsageError

PROG = "bksdm-tune"
INTERRUPTED = 128 + signal.SIGINT
PIPE_CLOSED = 128 + signal.SIGPIPE


class Verb(NamedTuple):
    """A command and the module whose ``main(argv) -> int`` does it."""

    name: str
    module: str
    help: str


# fmt: off
VERBS = (
    Verb("backbones",  "bksdm_tune.backbones_command",  "list the models to tune"),
    Verb("build",      "distill.build",                 "cut a student out of a teacher"),
    Verb("data",       "distill.fetch",                 "fetch published training pairs"),
    Verb("cache",      "distill.cache_command",         "compute a data set's latents once"),
    Verb("distill",    "distill.command",               "train a student to do as its teacher"),
    Verb("subjects",   "subjects.command",              "list, fetch, check the 30 subjects"),
    Verb("dreambooth", "bksdm_tune.dreambooth.command", "teach a model one subject"),
    Verb("generate",   "bksdm_tune.generate",           "draw pictures with what was tuned"),
    Verb("attention",  "bksdm_tune.attention_command",  "show which words drew which pixels"),
    Verb("evaluate",   "bksdm_tune.evaluate.command",   "score a backbone on captions"),
    Verb("score",      "bksdm_tune.evaluate.score_command", "score pictures of a subject"),
    Verb("sweep",      "bksdm_tune.sweep.command",      "benchmark subjects x backbones x methods"),
    Verb("compare",    "bksdm_tune.evaluate.compare",   "subtract two scores of one protocol"),
    Verb("export",     "bksdm_tune.files.export_command", "files for ComfyUI, A1111, kohya, PEFT"),
    Verb("adapter",    "bksdm_tune.files.adapter_command", "inspect, merge, resize adapter files"),
    Verb("port",       "bksdm_tune.files.port_command", "move a LoRA between SD and its students"),
    Verb("push",       "bksdm_tune.files.push",         "upload a run to the Hugging Face Hub"),
    Verb("app",        "bksdm_tune.app.command",        "the same in a browser"),
    Verb("doctor",     "bksdm_tune.doctor",             "print what a bug report needs"),
)
# fmt: on


def usage() -> str:
    width = max(len(verb.name) for verb in VERBS)
    rows = "\n".join(f"  {verb.name:<{width}}  {verb.help}" for verb in VERBS)
    return (
        f"usage: {PROG} VERB [FLAGS]\n\n"
        "Personalise compressed Stable Diffusion from a few photos.\n\n"
        f"verbs:\n{rows}\n\n"
        f"{PROG} VERB --help lists the flags of a verb; {PROG} --version prints the version.\n"
    )


def find_verb(name: str) -> Verb:
    """The row called ``name``.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    verbs = {verb.name: verb for verb in VERBS}
    if name in verbs:
        return verbs[name]
    close = difflib.get_close_matches(name, verbs)
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(verbs)}."
    raise UsageError(f"there is no verb {name!r}: {hint} Type {PROG} --help.")


def run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        (sys.stdout if argv else sys.stderr).write(usage())
        return 0 if argv else UsageError.exit_code
    if argv[0] == "--version":
        print(__version__)
        return 0
    module = importlib.import_module(find_verb(argv[0]).module)
    verb: Callable[[list[str]], int] = module.main
    return verb(argv[1:])


def main(argv: list[str]) -> int:
    """Run one verb; what the user caused becomes one message on stderr and an exit code.

    Raises:
        SystemExit: from a verb's own flag parser, 0 after ``--help``, 2 on wrong flags.
    """
    try:
        code = run(argv)
        sys.stdout.flush()
        return code
    except (UsageError, DataError, ProtocolError) as error:
        return complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return complain("interrupted.", INTERRUPTED)
    except BrokenPipeError:
        silence(sys.stdout)
        return PIPE_CLOSED
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return full_disk(error.filename)
        if error.errno is None or error.filename is None:
            raise
        return complain(f"{error.filename}: {error.strerror}.", DataError.exit_code)
    except Exception as error:
        if "No space left on device" in str(error):  # safetensors has an error of its own
            return full_disk(None)
        raise


def full_disk(where: str | None) -> int:
    silence(sys.stdout)
    place = f" at {where}" if where else ""
    return complain(f"disk full{place}: free some space, then repeat.", DataError.exit_code)


def complain(message: str, code: int) -> int:
    print(f"{PROG}: {message}", file=sys.stderr)
    return code


def silence(stream: TextIO) -> None:
    """Let the interpreter's own flush at exit succeed although nothing takes the output."""
    with contextlib.suppress(OSError):
        stream.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def leave(codes: list[int]) -> None:
    """End here where a command has ended: taking its libraries apart, object by object, takes over
    a second."""
    if codes:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # closed, or not there
                stream.flush()
        os._exit(codes[0])


YOUNG = 50_000
"""New objects before the collector looks for garbage.  Loading the libraries makes 800,000 that
stay, and with Python's own 700 a quarter of that time goes into looking at them."""


def entry() -> NoReturn:
    gc.set_threshold(YOUNG)
    codes: list[int] = []
    atexit.register(leave, codes)  # before all others, hence run after them
    # `kill`, a batch scheduler and a closing app end a run the way Ctrl-C does.
    signal.signal(signal.SIGTERM, interrupt)
    codes.append(main(sys.argv[1:]))
    sys.exit(codes[0])
