"""A second process that computes half of every micro-batch, on a CPU with a core to spare.

The operations of a small U-Net are too short to be divided among cores, so a second thread gains
next to nothing (docs/performance.md); its rows can be divided.  The twin is a fork of this process.
Both see the same parameters, which this process trains; the twin leaves its gradients in memory
that both share, and this process adds them to its own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
from torch import Tensor

from bksdm_tune.errors import DataError
from bksdm_tune.loop import Batches, Losses, Objective
from bksdm_tune.processes import count
from bksdm_tune.seeds import reseed, seed_for

OWN_STREAM = 2
"""Sets the twin's dropout apart from the loop's."""

DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG
SMALL = 64e6
"""Bytes of models up to which half the rows in each of two processes are faster than all rows in
one with two threads."""

THREADS = range(2, 5)
"""With more, threads win where the rows are large."""


def pays(device: str, weights: int, rows: int) -> bool:
    """Whether to have a twin: by the threads this process may use, the bytes of the models that
    take part, the rows of a micro-batch, and where forks are safe."""
    alone = count() == 1 and threading.current_thread() is threading.main_thread()
    room = device == "cpu" and sys.platform == "linux" and torch.get_num_threads() in THREADS
    return room and alone and weights <= SMALL and rows > 1


@dataclass
class Twin:
    """``batches`` and ``objective``: its share of what the loop computes, by micro-batch; gradients
    are scaled by one over ``accumulation``.  For the loop: ``running``, and in it for each
    micro-batch ``go`` and ``join``.
    """

    objective: Objective
    batches: Batches
    seed: int
    accumulation: int
    memory_gb: float = 0.0
    """What it holds at its end that it shares with nobody."""
    _threads: int = field(default=1, repr=False)
    _pipe: Connection | None = field(default=None, repr=False)
    _pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    @contextmanager
    def running(self, parameters: list[Tensor], first: int) -> Iterator[None]:
        """For the time of the block, which begins with micro-batch number ``first``; both processes
        then have one thread each.

        Raises:
            DataError: there can be no second process, or it has ended.
        """
        for parameter, shared in zip(parameters, shared_like(parameters), strict=True):
            parameter.data = shared.copy_(parameter.data)
        self._pairs = list(zip(parameters, shared_like(parameters), strict=True))
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)  # before the fork, which OpenMP's own threads do not survive
        self._pipe, there = Pipe()
        try:
            child = self._told(lambda _: os.fork())
            if child == 0:
                self._live(there, first)
            try:
                there.close()
                yield
                self._told(lambda pipe: pipe.send(False))
                self.memory_gb = self._told(lambda pipe: pipe.recv())
            finally:
                self._pipe.close()
                os.waitpid(child, 0)
        finally:
            torch.set_num_threads(self._threads)
            self._pipe, self._pairs = None, []

    @contextmanager
    def resting(self) -> Iterator[None]:
        """All threads for this process, while the twin waits for it."""
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(1)

    def go(self) -> None:
        """Begin the next micro-batch."""
        self._told(lambda pipe: pipe.send(True))

    def join(self, losses: Losses) -> Losses:
        """Add the twin's gradients to the parameters' own, and its losses to these.

        Raises:
            DataError: the twin has ended.
        """
        theirs = self._told(lambda pipe: pipe.recv())
        pairs = [(own.grad, shared) for own, shared in self._pairs if own.grad is not None]
        torch._foreach_add_(*(list(side) for side in zip(*pairs, strict=True)))
        return {name: value.detach() + theirs[name] for name, value in losses.items()}

    def _told(self, exchange: Any) -> Any:
        assert self._pipe is not None, "outside running()"
        try:
            return exchange(self._pipe)
        except (EOFError, OSError) as error:
            raise DataError(
                "The second process of this run has ended or cannot begin, perhaps for want of "
                "memory. Type the same command again: it goes on from the last checkpoint; with "
                "OMP_NUM_THREADS=1 it does without a second process."
            ) from error

    def _live(self, pipe: Connection, first: int) -> None:
        """The twin's own life; Ctrl-C is for the other, with whom it ends."""
        try:
            assert self._pipe is not None
            self._pipe.close()
            for kind in (signal.SIGINT, signal.SIGTERM):
                signal.signal(kind, signal.SIG_IGN)
            ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
            torch.set_num_threads(1)
            for number, batch in enumerate(self.batches(first), first):
                if not pipe.recv():
                    break
                pipe.send(self._compute(batch, *divmod(number, self.accumulation)))
            pipe.send(psutil.Process().memory_full_info().uss / 1e9)
        except (EOFError, ConnectionError):
            pass
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)

    def _compute(self, batch: Any, step: int, micro: int) -> dict[str, float]:
        reseed(seed_for(self.seed, step, micro, OWN_STREAM))
        losses = self.objective(batch)
        (losses["loss"] / self.accumulation).backward()
        for parameter, shared in self._pairs:
            if parameter.grad is None:
                shared.zero_()
            else:
                shared.copy_(parameter.grad)
            parameter.grad = None
        return {name: value.item() for name, value in losses.items()}


def shared_like(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors of these shapes, layouts and types in memory that forks share, each with a storage of
    its own."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.numel() * tensor.element_size() // 64) * 64
    memory = mmap.mmap(-1, max(end, 1))
    return [
        torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=start).as_strided(
            t.shape, t.stride()
        )
        for t, start in zip(tensors, starts, strict=True)
    ]
