"""Intervals that cover, tests that know chance, comparisons by key."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from bksdm_tune.cli import main
from bksdm_tune.evaluate import subject_scores
from bksdm_tune.evaluate.compare import compare
from bksdm_tune.evaluate.statistics import (
    Cells,
    bootstrap_cells,
    crossed_variance,
    holm,
    sign_flip,
    student_quantile,
)


def simulated(
    rng: np.random.Generator, spreads: tuple[float, float, float], subjects: int
) -> Cells:
    """Subjects, prompts of two lists and residuals, all random around 0.02."""
    of_subject, of_prompt, rest = spreads
    group = (np.arange(subjects) >= 0.7 * subjects).astype(int)
    prompts = rng.normal(0, of_prompt, (2, 25))[group]
    noise = rng.normal(0, rest, (subjects, 25))
    return Cells(0.02 + rng.normal(0, of_subject, (subjects, 1)) + prompts + noise, group)


@pytest.mark.parametrize(
    ("spreads", "subjects"),
    [((0.08, 0.03, 0.05), 30), ((0.02, 0.05, 0.1), 30), ((0.01, 0.01, 0.1), 30),
     ((0.05, 0.05, 0.02), 30), ((0.05, 0.03, 0.05), 10)],
)  # fmt: skip
def test_the_interval_covers(spreads: tuple[float, float, float], subjects: int) -> None:
    """1,000 simulations each: a true coverage of 95 % is seen between 93 and 97 with 99.6 %."""
    rng, hits = np.random.default_rng(5), 0
    for number in range(1000):
        low, high = bootstrap_cells(simulated(rng, spreads, subjects), number, 300) or (1.0, 0.0)
        hits += low <= 0.02 <= high
    assert 930 <= hits <= 970


def test_crossed_variance_is_unbiased() -> None:
    """Against the variance of the means themselves, over 3,000 worlds."""
    rng, spreads = np.random.default_rng(0), (0.02, 0.05, 0.1)
    worlds = [simulated(rng, spreads, 20) for _ in range(3000)]
    true = np.var([world.by_subject().mean() for world in worlds])
    assert np.mean([crossed_variance(world)[0] for world in worlds]) == pytest.approx(
        true, rel=0.08
    )


def test_missing_cells_do_not_matter_much() -> None:
    cells = simulated(np.random.default_rng(1), (0.05, 0.03, 0.05), 30)
    holes = cells.values.copy()
    holes[3, 4] = holes[20, 7] = np.nan
    whole, part = bootstrap_cells(cells), bootstrap_cells(Cells(holes, cells.group))
    assert whole and part and np.allclose(whole, part, atol=0.005)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(3, 3.182), (5, 2.571), (10, 2.228), (29, 2.045)]
)
def test_students_quantile(freedom: int, quantile: float) -> None:
    assert student_quantile(freedom) == pytest.approx(quantile, rel=0.01)


def test_one_subject_says_nothing_about_others() -> None:
    assert bootstrap_cells(Cells(np.ones((1, 5)), np.zeros(1))) is None
    assert sign_flip(np.ones(1)) is None


def test_sign_flips_are_all_tried() -> None:
    values = np.array([0.3, -0.1, 0.5, 0.2])
    sums = [abs(sum(s * v for s, v in zip(signs, values, strict=True)))
            for signs in product((1, -1), repeat=4)]  # fmt: skip
    assert sign_flip(values) == np.mean([s >= 0.9 - 1e-12 for s in sums])


def test_sign_flip_knows_chance() -> None:
    """Of pure noise p is uniform; of a clear effect it is as small as it can be."""
    rng = np.random.default_rng(0)
    p = np.array([sign_flip(rng.normal(size=30), draws=500) for _ in range(400)])
    assert (p < 0.1).mean() == pytest.approx(0.1, abs=0.045) and p.mean() == pytest.approx(
        0.5, abs=0.06
    )
    assert sign_flip(np.full(10, 0.1)) == 2 / 2**10
    assert (sign_flip(np.full(30, 0.1)) or 1) < 1e-4


def test_holm_by_hand() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert adjusted == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def scored(folder: Path, shift: float = 0.0, reverse: bool = False, **changes: Any) -> Path:
    """A result as ``score`` writes it: 6 subjects, 5 prompts, 2 pictures."""
    rng = np.random.default_rng(0)
    rows = []
    for subject, prompt, sample in product(range(6), range(5), range(2)):
        row = dict.fromkeys(subject_scores.COLUMNS)
        row |= {"role": "generated", "subject_id": f"s{subject}", "prompt_id": f"p{prompt}",
                "seed": sample, "sample_idx": sample, "group": "live" if subject < 2 else "object",
                "references": 4}  # fmt: skip
        row |= {name: float(rng.uniform()) + shift for name in ("dino", "clip_i", "clip_t")}
        rows.append(row)
    metrics = {name: subject_scores.summary(rows, name, "none") for name in subject_scores.MEASURES}
    folder.mkdir()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows[::-1] if reverse else rows), folder / "images.parquet"
    )
    result = {"schema": "bksdm-tune/scores/1", "kind": "subjects", "fingerprint": "x",
              "protocol": {"name": "dreambooth"}, "metrics": metrics} | changes  # fmt: skip
    (folder / "scores.json").write_text(json.dumps(result))
    return folder


def test_compared_with_itself_nothing_differs(tmp_path: Path) -> None:
    path = scored(tmp_path / "a")
    for entry in compare(path, path).values():
        assert entry["difference"] == 0 and entry["ci95"] == (0, 0) and entry["p"] == 1


def test_pairs_are_found_by_key(tmp_path: Path) -> None:
    """The rows of B are in another order and a hundredth better."""
    report = compare(scored(tmp_path / "a"), scored(tmp_path / "b", 0.01, reverse=True))
    assert report.keys() == {"dino", "clip_i", "clip_t"}
    for entry in report.values():
        assert entry["difference"] == pytest.approx(0.01, abs=1e-12)
        assert entry["ci95"] == pytest.approx((0.01, 0.01), abs=1e-9)
        assert entry["p"] == pytest.approx(2 / 2**6) and entry["pairs"] == 60
        assert entry["p_holm"] == pytest.approx(6 / 2**6)


def test_other_protocols_are_refused(tmp_path: Path, capsys: Any) -> None:
    a = scored(tmp_path / "a")
    b = scored(tmp_path / "b", fingerprint="y", protocol={"name": "pocket"})
    assert main(["compare", str(a), str(b)]) == 5
    assert "name (dreambooth and pocket)" in capsys.readouterr().err
