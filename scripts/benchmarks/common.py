"""What all benchmarks share: programs as children, turns, medians, the report."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bksdm_tune.artifacts import versions
from bksdm_tune.precision import choose
from bksdm_tune.resolve import Parts, resolve
from scripts.full_size import SHAPES, write_pipeline

ROOT = Path(__file__).resolve().parent.parent.parent
CHILD = Path(__file__).with_name("child.py")
Facts = dict[str, Any]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def add_model(parser: argparse.ArgumentParser, flag: str, default: str) -> None:
    """Which model is measured, and whether only a dry run is asked for."""
    parser.add_argument(flag, dest="model", default=default, help="registry name or folder")
    parser.add_argument(
        "--full-size", choices=SHAPES, help=f"in place of {flag}, published shapes, random weights"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run")


def model(options: argparse.Namespace, scratch: Path) -> Parts:
    """The model that is asked for; a full-size one is made in ``scratch``."""
    if not options.full_size:
        return resolve(options.model)
    folder = scratch / options.full_size
    write_pipeline(folder, **SHAPES[options.full_size])
    return resolve(str(folder))


def wall(words: list[str], folder: Path, cache: Path | None = None) -> float:
    """Seconds of a Python program (a script or ``-m MODULE``, with arguments); it must succeed."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": str(device() == "cpu"),
    }
    if cache is not None:
        environment["BKSDM_CACHE"] = str(cache)
    command = [sys.executable, *words]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr[-4000:]}")
    return seconds


def child(words: list[str], folder: Path, cache: Path | None = None) -> Facts:
    """How such a program went: its steps and memory (child.py) beside its seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "facts.json"
        seconds = wall([str(CHILD), str(target), *words], folder, cache)
        return json.loads(target.read_text()) | {"seconds": seconds}


def in_turns(sides: Mapping[str, Callable[[], Facts]], repeats: int) -> dict[str, list[Facts]]:
    """Every side ``repeats`` times, one after the other."""
    found: dict[str, list[Facts]] = {name: [] for name in sides}
    for number in range(repeats):
        for name, measure in sides.items():
            found[name].append(measure())
            torch.cuda.empty_cache()  # what this process measured for itself, for the children
            print(f"turn {number + 1}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    return found


def medians(turns: Mapping[str, list[Facts]]) -> dict[str, Facts]:
    return {
        name: {
            key: statistics.median(facts[key] for facts in side)
            for key, value in side[0].items()
            if isinstance(value, int | float) and all(key in facts for facts in side)
        }
        for name, side in turns.items()
    }


def median_seconds(work: Callable[[], Any], rounds: int = 8) -> float:
    seconds = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        work()
        if device() == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def matrix_rate() -> float:
    """FLOP/s of a square matrix product in the precision that training computes in."""
    side, precision = (2048, "no") if device() == "cpu" else (8192, choose("auto", device()))
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    left, right = torch.randn(2, side, side, device=device(), dtype=dtype)
    return 2 * side**3 / median_seconds(lambda: left @ right)


def report_steps(
    options: argparse.Namespace,
    turns: Mapping[str, list[Facts]],
    work: Callable[[], Any],
    **more: Any,
) -> None:
    """Of sides with ``step_seconds``, one of them ``ours``; ``work``: the arithmetic of a step."""
    middle = medians(turns)
    step = {name: facts["step_seconds"] for name, facts in middle.items()}
    with FlopCounterMode(display=False) as counter:
        work()
    found = {
        "medians": middle,
        "step_over_ours": {name: value / step["ours"] for name, value in step.items()},
        "share_of_matrix_rate": counter.get_total_flops() / step["ours"] / matrix_rate(),
    }
    report(options, found | more | {"turns": turns})


def processor() -> str:
    """Its name, or at least its kind."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def revision(checkout: Path) -> str:
    """Commit of a checkout, or unknown."""
    words = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def machine() -> Facts:
    return {
        "device": torch.cuda.get_device_name() if device() == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def report(options: argparse.Namespace, facts: Facts) -> None:
    """Print and write what was found, with the command, the machine and the versions."""
    peers = {
        name: revision(path)
        for name in ("diffusers", "reference")
        if (path := getattr(options, name, None)) is not None
    }
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]
    heading = {"command": " ".join(["python", *words]), "commit": revision(ROOT), "peers": peers}
    whole = heading | facts | machine()
    text = json.dumps(whole, indent=2, default=str)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n")
    print(text)
