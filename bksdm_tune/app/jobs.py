"""Trainings that the app starts: child processes, one at a time, in a queue that survives the app.

A job is a file in the library's ``.jobs`` folder and a ``bksdm-tune dreambooth`` process in a
session of its own, so that neither a browser's reload nor the app's death ends it.  What a job says
of itself is read from its run folder, where the command writes it anyway.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bksdm_tune.artifacts import MANIFEST, write_text_atomic
from bksdm_tune.errors import UsageError

FOLDER = ".jobs"
QUEUED, RUNNING, PAUSED, CANCELLED = "queued", "running", "paused", "cancelled"
FAILED, INTERRUPTED, DONE = "failed", "interrupted", "done"
RESUMABLE = (PAUSED, CANCELLED, INTERRUPTED, FAILED)
MOST_QUEUED = 20
PULSE = 0.3  # seconds


@dataclass(frozen=True)
class Job:
    """``words``: what stands after ``bksdm-tune``; ``run``: the folder that it fills."""

    title: str
    words: tuple[str, ...]
    run: Path
    steps: int
    owner: str | None = None
    state: str = QUEUED
    pid: int | None = None
    error: str | None = None
    created: float = field(default_factory=time.time)
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    @property
    def command(self) -> str:
        """The exact command line."""
        return shlex.join(["bksdm-tune", *self.words])


@dataclass(frozen=True)
class Progress:
    """What a job's run folder says."""

    step: int
    steps: int
    losses: list[tuple[int, float]]
    seconds_left: float | None
    pictures: list[Path]


class Jobs:
    """All jobs of a library, and the thread that runs them."""

    def __init__(self, library: Path, before: Callable[[], None] = lambda: None) -> None:
        """``before``: called before a training starts."""
        self.before = before
        self.folder = library.absolute() / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True, name="jobs")

    def start(self) -> None:
        """Find out what became of running jobs, then take care of the queue."""
        for job in self.all():
            if job.state == RUNNING and not alive(job):
                self._write(replace(job, state=DONE if finished(job) else INTERRUPTED, pid=None))
        self.thread.start()

    def stop(self) -> None:
        """Leave running jobs alone; another app finds them again."""
        self.stopping.set()

    def all(self) -> list[Job]:
        """In the order in which they came."""
        found = []
        for path in self.folder.glob("*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                facts = json.loads(path.read_text("utf-8"))
                found.append(
                    Job(**facts | {"words": tuple(facts["words"]), "run": Path(facts["run"])})
                )
        return sorted(found, key=lambda job: job.created)

    def get(self, name: str) -> Job:
        """
        Raises:
            UsageError: there is no such job.
        """
        for job in self.all():
            if job.id == name:
                return job
        raise UsageError("There is no such job.")

    def add(self, job: Job) -> Job:
        """
        Raises:
            UsageError: the queue is full.
        """
        with self.lock:
            self.check_room()
            self._write(job)
        return job

    def check_room(self) -> None:
        """Raises UsageError: the queue is full."""
        if sum(other.state == QUEUED for other in self.all()) >= MOST_QUEUED:
            raise UsageError(f"{MOST_QUEUED} jobs are waiting; try again when some are done.")

    def end(self, name: str, state: str) -> None:
        """Pause or cancel: the run saves a checkpoint and stops; both can be resumed."""
        assert state in (PAUSED, CANCELLED)
        with self.lock:
            job = self.get(name)
            if job.pid is not None and alive(job):
                self._write(replace(job, state=state))
                if job.state == RUNNING:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(job.pid, signal.SIGTERM)
            elif job.state in (QUEUED, PAUSED):
                self._write(replace(job, state=state))

    def resume(self, name: str) -> None:
        """Put a job that was stopped at the end of the queue; it goes on from its checkpoint.

        Raises:
            UsageError: it is still stopping.
        """
        with self.lock:
            job = self.get(name)
            if alive(job) and job.state in RESUMABLE:
                raise UsageError("It is still stopping; try again in a moment.")
            if job.state in RESUMABLE:
                self.add(replace(job, state=QUEUED, error=None, created=time.time(), pid=None))

    def forget(self, name: str) -> None:
        """Drop a job from the list; its run folder stays.

        Raises:
            UsageError: it is running.
        """
        with self.lock:
            job = self.get(name)
            if alive(job):
                raise UsageError("It is still running; cancel it first, and wait for it to stop.")
            for suffix in (".json", ".log"):
                (self.folder / job.id).with_suffix(suffix).unlink(missing_ok=True)

    def place(self, job: Job) -> int:
        """How many are running or waiting before it."""
        return sum(o.state in (RUNNING, QUEUED) and o.created < job.created for o in self.all())

    def _write(self, job: Job) -> None:
        text = json.dumps(asdict(job), default=str, indent=1)
        write_text_atomic(self.folder / f"{job.id}.json", text + "\n")

    def _work(self) -> None:
        process: subprocess.Popen[bytes] | None = None
        while not self.stopping.wait(PULSE):
            with self.lock, contextlib.suppress(OSError):  # a full disk may be free again later
                process = self._step(process)

    def _step(self, process: subprocess.Popen[bytes] | None) -> subprocess.Popen[bytes] | None:
        """Settle what has ended; start the next if nothing runs."""
        if process is not None:
            process.poll()  # or it would stay as a zombie, and look alive
        busy = False
        for job in self.all():
            if job.pid is None:
                continue
            if alive(job):
                busy = True
            else:
                self._settle(job)
        waiting = [job for job in self.all() if job.state == QUEUED]
        if busy or not waiting:
            return process
        try:
            return self._launch(waiting[0])
        except ValueError as error:  # words that cannot be a command's
            self._write(replace(waiting[0], state=FAILED, error=str(error)))
            return process

    def _launch(self, job: Job) -> subprocess.Popen[bytes]:
        self.before()
        with open(self.folder / f"{job.id}.log", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "bksdm_tune", *job.words],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        try:
            self._write(replace(job, state=RUNNING, pid=process.pid))
        except OSError:  # nobody would know of it
            process.kill()
            process.wait()
            raise
        return process

    def _settle(self, job: Job) -> None:
        if finished(job):
            self._write(replace(job, state=DONE, pid=None, error=None))
        elif job.state in (PAUSED, CANCELLED):
            self._write(replace(job, pid=None))
        else:
            self._write(replace(job, state=FAILED, pid=None, error=self.last_words(job)))

    def last_words(self, job: Job) -> str:
        """The end of what the process wrote, for people."""
        try:
            lines = (self.folder / f"{job.id}.log").read_text("utf-8", "replace").splitlines()
        except OSError:
            lines = []
        said = [line for line in lines if line.strip()]
        start = next((i for i, line in enumerate(said) if line.startswith("bksdm-tune: ")), -1)
        return "\n".join(said[start:])[-1000:] if said else "it ended without a word"


def alive(job: Job) -> bool:
    """Whether the job's process is there, and is the job's: numbers are used again."""
    if job.pid is None:
        return False
    try:
        os.kill(job.pid, 0)
        words = Path(f"/proc/{job.pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except FileNotFoundError:
        return sys.platform != "linux"
    except OSError:
        return False
    return str(job.run) in words


def finished(job: Job) -> bool:
    return (job.run / MANIFEST).is_file()


def progress(job: Job) -> Progress:
    """From ``log.jsonl`` and ``samples/`` of the run; zero where nothing is there yet."""
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(OSError):
        for line in (job.run / "log.jsonl").read_text("utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    step = rows[-1]["step"] if rows else 0
    recent = [row["seconds"] for row in rows[-20:]]
    left = (job.steps - step) * sum(recent) / len(recent) if recent else None
    pictures = sorted((job.run / "samples").glob("step-*.png")) if rows or job.pid else []
    losses = [(row["step"], row["loss"]) for row in rows]
    return Progress(step, job.steps, losses, left, pictures)
