"""Who does the tasks: worker processes of this machine, or a Ray cluster; the same tasks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from bksdm_tune.errors import UsageError
from bksdm_tune.sweep.cells import Task

Outcome = tuple[Task, bool]


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def local(tasks: list[Task], out: Path, workers: int | None) -> Iterator[Outcome]:
    """A process a task, so that a crash costs that task and memory comes back; a GPU each."""
    cards = gpus()
    count = workers or max(1, cards)
    free: SimpleQueue[int] = SimpleQueue()
    for number in range(count):
        free.put(number)
    running: dict[int, subprocess.Popen[bytes]] = {}

    def work(task: Task) -> Outcome:
        number = free.get()
        try:
            (out / "logs").mkdir(exist_ok=True)
            with open(out / "logs" / f"worker-{number}.log", "ab") as log:
                words = [sys.executable, "-m", "bksdm_tune.sweep.work", str(out)]
                words.append(json.dumps([asdict(cell) for cell in task]))
                environment = surroundings(number, count, cards)
                running[number] = subprocess.Popen(
                    words, stdout=log, stderr=log, env=environment, start_new_session=True
                )
                return task, running[number].wait() == 0
        finally:
            free.put(number)

    pool = ThreadPoolExecutor(count)
    try:
        for future in as_completed([pool.submit(work, task) for task in tasks]):
            yield future.result()
    except BaseException:  # Ctrl-C: let each save its checkpoint
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in running.values():
            process.wait()
        raise
    pool.shutdown()


def surroundings(number: int, count: int, cards: int) -> dict[str, str]:
    """A worker's environment: its own GPU, or its share of the cores."""
    if cards:
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = given if len(given) >= cards and given[0] else [str(i) for i in range(cards)]
        return os.environ | {"CUDA_VISIBLE_DEVICES": names[number % cards]}
    share = max(1, (os.cpu_count() or 1) // count)
    return os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(share))}


def ray(tasks: list[Task], out: Path, workers: int | None) -> Iterator[Outcome]:
    """Of the cluster at $RAY_ADDRESS, or of this machine; ``out`` lies on a disk that all share.

    Ray gives a task whose worker died to another one, which goes on from the last checkpoint.

    Raises:
        UsageError: Ray is not installed.
    """
    try:
        import ray as cluster
    except ImportError:
        raise UsageError(
            "--engine ray needs Ray. Type: pip install 'bksdm-tune[cluster]'"
        ) from None
    if not cluster.is_initialized():
        cluster.init(log_to_driver=False, include_dashboard=False)
    cards = cluster.cluster_resources().get("GPU", 0)
    share: dict[str, Any] = {"num_gpus": 1} if cards else {"num_cpus": cpus_each(cluster, workers)}
    remote = cluster.remote(max_retries=3, **share)(_do)
    waiting = {remote.remote(str(out.resolve()), task): task for task in tasks}
    while waiting:
        ready, _ = cluster.wait(list(waiting), num_returns=1)
        task = waiting.pop(ready[0])
        try:
            yield task, cluster.get(ready[0])
        except cluster.exceptions.RayError:
            yield task, False


def cpus_each(cluster: Any, workers: int | None) -> float:
    total = cluster.cluster_resources().get("CPU", 1)
    return float(max(1.0, total // workers)) if workers else 1.0


def _do(out: str, task: Task) -> bool:
    from bksdm_tune.sweep.work import do

    return do(Path(out), task)


ENGINES = {"local": local, "ray": ray}
