"""Mixed precision: what a job computes in, and what its frozen weights are kept in."""

from __future__ import annotations

import torch

from bksdm_tune.dreambooth.job import Job


def precision(job: Job) -> str:
    """no, bf16 or fp16."""
    asked = job.config.training.precision
    if asked != "auto":
        return asked
    if job.device == "cpu":
        return "no"
    return "bf16" if job.device == "cuda" and torch.cuda.is_bf16_supported() else "fp16"


def frozen_dtype(job: Job) -> torch.dtype:
    """Frozen weights are kept in half precision under mixed precision; trained ones never are."""
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision(job)]
