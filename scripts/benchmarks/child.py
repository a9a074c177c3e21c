"""Run a program and write down how it went, in the same way for everybody's programs.

    python scripts/benchmarks/child.py FACTS.json SCRIPT.py|-m MODULE [ARGUMENT ...]

FACTS: seconds from the start of this process, when the first optimiser step was done, seconds a
step over all steps after the first ``WARM_UP``, and peak memory.
"""

from __future__ import annotations

import json
import resource
import runpy
import sys
import time
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder, where a module is called distill

WARM_UP = 16

STARTED = time.perf_counter()


def watch_steps(done: list[float]) -> None:
    """Note the time after every optimiser step."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda *_: done.append(time.perf_counter()))


def facts(done: list[float]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "seconds": time.perf_counter() - STARTED,
        "resident_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "optimiser_steps": len(done),
    }
    if done:
        found["first_step_after"] = done[0] - STARTED
    if len(done) > WARM_UP + 1:
        found["step_seconds"] = (done[-1] - done[WARM_UP]) / (len(done) - 1 - WARM_UP)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["device_gb"] = torch.cuda.max_memory_allocated() / 1e9
        found["device_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return found


def run(words: list[str]) -> int:
    name, *rest = words[1:] if words[0] == "-m" else words
    sys.argv = [name, *rest]
    try:
        if words[0] == "-m":
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(name).parent))
            runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    target, steps = Path(sys.argv[1]), list[float]()
    watch_steps(steps)
    code = run(sys.argv[2:])
    target.write_text(json.dumps(facts(steps)))
    sys.exit(code)
