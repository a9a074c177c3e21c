"""Several processes training one model: who am I, what is my share, what is the mean.

Data parallel with one reduction an optimiser step: gradients are averaged once, after the last
micro-batch, so nothing wraps the model and the loop need not know it.  One process pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, distributed

from bksdm_tune.errors import DataError

BUCKET_BYTES = 1 << 28  # gradients travel in flat pieces of at most this much


def rank() -> int:
    """Of this process, from 0."""
    return distributed.get_rank() if _several() else 0


def count() -> int:
    """Processes of this job."""
    return distributed.get_world_size() if _several() else 1


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def my_share(draw: Callable[[int], Tensor], size: int) -> Tensor:
    """``size`` random rows for this process, cut from what one process would have drawn for all.

    All processes hold the same generator state, so N processes of batch B see the numbers of one
    process of batch N B.
    """
    start = rank() * size
    return draw(size * count())[start : start + size]


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over the processes.

    Raises:
        DataError: another process of the job has ended.
    """
    if count() == 1:
        return
    bucket: list[Tensor] = []
    filled = 0
    for parameter in parameters:
        if parameter.grad is None:
            continue
        bucket.append(parameter.grad)
        filled += parameter.grad.numel() * parameter.grad.element_size()
        if filled >= BUCKET_BYTES:
            _average(bucket)
            bucket, filled = [], 0
    if bucket:
        _average(bucket)


def _average(tensors: list[Tensor]) -> None:
    flat = mean(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def mean(tensor: Tensor) -> Tensor:
    """Mean of a tensor over the processes, in place.

    Raises:
        DataError: another process of the job has ended.
    """
    if count() > 1:
        _guarded(lambda: distributed.all_reduce(tensor))
        tensor /= count()
    return tensor


def first_says(answer: bool) -> bool:
    """The first process's answer, in all of them.

    Raises:
        DataError: another process of the job has ended.
    """
    if count() == 1:
        return answer
    said = [answer]
    _guarded(lambda: distributed.broadcast_object_list(said))
    return said[0]


def wait() -> None:
    """Until every process is here.

    Raises:
        DataError: another process of the job has ended.
    """
    if count() > 1:
        _guarded(distributed.barrier)


def _guarded(collective: Callable[[], object]) -> None:
    try:
        collective()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise DataError(
            f"Another process of this job has ended, so process {rank()} stops too. "
            "Type the same command again: it goes on from the last checkpoint."
        ) from error
