"""Optimisers and schedules by name."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from bksdm_tune.errors import UsageError
from bksdm_tune.optim import OptimiserName, ScheduleName, make_optimiser, make_schedule

SCHEDULES = get_args(ScheduleName)


def groups() -> list[dict[str, object]]:
    return [
        {"params": [torch.nn.Parameter(torch.ones(2, 3))], "lr": 1e-3},
        {"params": [torch.nn.Parameter(torch.ones(3))], "lr": 1e-5},
    ]


@pytest.mark.parametrize("optimiser", ["adamw", "adafactor"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_pair_steps_at_both_rates(optimiser: OptimiserName, schedule: ScheduleName) -> None:
    assert len(SCHEDULES) == 6
    made = make_optimiser(optimiser, groups())
    rates = make_schedule(schedule, made, 0, 10)
    for _ in range(4):
        for group in made.param_groups:
            group["params"][0].grad = torch.ones_like(group["params"][0])
        made.step()
        rates.step()
    first, second = rates.get_last_lr()
    assert first == pytest.approx(100 * second, rel=1e-3)
    assert (first == 1e-3) == schedule.startswith("constant")
    assert all((group["params"][0] < 1).all() for group in made.param_groups)


@pytest.mark.parametrize(("name", "extra"), [("adamw8bit", "gpu"), ("prodigy", "prodigy")])
def test_a_missing_library_is_named_with_what_to_type(
    name: OptimiserName, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("bitsandbytes", "bitsandbytes.optim", "prodigyopt"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UsageError, match=rf"pip install 'bksdm-tune\[{extra}\]'"):
        make_optimiser(name, groups())
