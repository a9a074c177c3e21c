"""The benchmark in one command: cells, tables, resumption, crashes, a cluster."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import scoring
from bksdm_tune.cli import main
from bksdm_tune.dreambooth import together
from bksdm_tune.sweep import engines
from bksdm_tune.sweep.cells import cells, tasks
from bksdm_tune.sweep.config import Config
from bksdm_tune.sweep.work import do
from subjects.catalogue import SUBJECTS
from tiny import make_pipeline

TRIO = "dog,can,backpack_dog"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("parts")
    backbone = make_pipeline(folder / "tiny-base", size="base")
    return {"backbone": backbone, "judges": scoring.make_judges(folder)}


def words(parts: dict[str, Any], out: Path, **flags: Any) -> list[str]:
    given = {"subjects": TRIO, "methods": "lora", "steps": 2, "prompts": 2, "images": 2}
    given |= {"class_images": 1, "backbones": parts["backbone"], "out": out}
    given |= {"dino": parts["judges"][0], "clip": parts["judges"][1]} | flags
    return ["sweep", *(x for k, v in given.items() for x in (f"--{k.replace('_', '-')}", str(v)))]


@pytest.fixture(scope="module")
def swept(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "out"
    assert main(words(parts, out, methods="lora,full")) == 0
    return out


def arms(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "arms").iterdir())


def test_the_benchmark_is_3000_pictures() -> None:
    """30 subjects, 158 photos, 9 live ones, 750 cells of 4 pictures."""
    config = Config(Path("x"), backbones="a,b,c", methods="lora,full", seeds="1,2")
    assert len(cells(config)) == 30 * 3 * 2 * 2
    assert sum(len(s.photos) for s in SUBJECTS.values()) == 158
    assert sum(s.live for s in SUBJECTS.values()) == 9
    assert len(SUBJECTS) * config.prompts == 750 and config.images == 4
    sizes = [len(task) for task in tasks(cells(config), 10)]
    assert sizes.count(10) == 3 * 3 * 2 and sizes.count(1) == 30 * 3 * 2


def test_every_cell_is_trained_and_scored(swept: Path) -> None:
    found = sorted(path.name for path in (swept / "cells").iterdir())
    assert len(found) == 6
    for name in found:
        facts = json.loads((swept / "cells" / name / "cell.json").read_text())
        assert facts["seconds"] > 0 and facts["images_per_second"] > 0
        assert facts["trained_together"] == (3 if facts["method"] == "lora" else 1)
    small, large = (
        json.loads((swept / f"cells/dog-tiny-base-{m}-seed1234/cell.json").read_text())["megabytes"]
        for m in ("lora", "full")
    )
    assert 0 < small < large


def test_arms_are_means_over_their_cells(swept: Path) -> None:
    for arm in arms(swept):
        result = json.loads((swept / "arms" / arm / "scores.json").read_text())
        assert result["counts"]["subjects"] == 3 and result["counts"]["generated"] == 12
        alone = [
            json.loads((swept / f"cells/{name}-{arm}-seed1234/score/scores.json").read_text())
            for name in TRIO.split(",")
        ]
        for name in ("dino", "clip_t", "pres"):
            values = [one["metrics"][name]["macro"] for one in alone]
            assert result["metrics"][name]["macro"] == pytest.approx(np.mean(values), abs=1e-12)
        floors = [one["metrics"]["dino"]["floor"] for one in alone]
        assert result["metrics"]["dino"]["floor"] == pytest.approx(np.mean(floors), abs=1e-12)
        assert result["metrics"]["dino"]["ci95"] is not None


def test_the_tables_say_what_the_arms_say(swept: Path) -> None:
    with open(swept / "leaderboard.csv", newline="") as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert sorted(rows) == arms(swept) == ["tiny-base-full", "tiny-base-lora"]
    text = (swept / "table.md").read_text()
    for arm, row in rows.items():
        result = json.loads((swept / "arms" / arm / "scores.json").read_text())
        assert float(row["dino"]) == result["metrics"]["dino"]["macro"]
        assert f"| {arm} | 3 of 3 |" in text
    assert "| tiny-base-full - tiny-base-lora |" in text
    page = (swept / "report.html").read_text()
    assert "<svg" in page and 'src="http' not in page and 'href="http' not in page


def test_a_finished_sweep_does_nothing_again(swept: Path, parts: Any) -> None:
    times = {path: path.stat().st_mtime_ns for path in swept.glob("cells/*/cell.json")}
    tables = (swept / "table.md").read_bytes()
    assert main(words(parts, swept, methods="lora,full")) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert (swept / "table.md").read_bytes() == tables


def test_a_sweep_grows(swept: Path, parts: Any, tmp_path: Path, capsys: Any) -> None:
    """Asked for one more subject, it makes that one and tables all."""
    out = tmp_path / "copy"
    shutil.copytree(swept, out)
    assert main(words(parts, out, subjects="vase")) == 0
    assert "| tiny-base-lora | 4 of 4 |" in (text := (out / "table.md").read_text())
    assert "| tiny-base-full | 3 of 3 |" in text
    assert len(list(out.glob("cells/*/cell.json"))) == 7


def test_one_subject_two_methods(swept: Path, parts: Any, tmp_path: Path, capsys: Any) -> None:
    """No interval and no p, but a table; typos are told before anything starts."""
    out = tmp_path / "out"
    shutil.copytree(swept, out)
    cells_ = json.loads((out / "cells.json").read_text())
    (out / "cells.json").write_text(json.dumps([c for c in cells_ if c["subject"] == "dog"]))
    assert main(words(parts, out, subjects="dog", methods="lora,full")) == 0
    assert "| tiny-base-full - tiny-base-lora | " in (out / "table.md").read_text()
    assert main(words(parts, out, subjects="dog", backbones="bk-bsae")) == 2
    assert "bk-base" in capsys.readouterr().err


def test_arms_without_a_subject_in_common(
    swept: Path, parts: Any, tmp_path: Path, capsys: Any
) -> None:
    """They stand in the table, and their difference says why there is none."""
    out = tmp_path / "copy"
    shutil.copytree(swept, out)
    cells_ = json.loads((out / "cells.json").read_text())
    kept = [c for c in cells_ if (c["subject"] == "dog") == (c["method"] == "lora")]
    (out / "cells.json").write_text(json.dumps(kept))
    assert main(words(parts, out, subjects="dog")) == 0
    text = (out / "table.md").read_text()
    assert "| tiny-base-lora | 1 of 1 |" in text and "| tiny-base-full | 2 of 2 |" in text
    assert "not comparable: The two results have no picture in common." in text
    assert "not comparable" in (out / "report.html").read_text()


def test_another_backbone_of_the_same_name_is_refused(
    swept: Path, parts: Any, tmp_path: Path, capsys: Any
) -> None:
    other = make_pipeline(tmp_path / "tiny-base", size="base", seed=5)
    assert main(words(parts, swept, backbones=other)) == 2
    assert "rename one backbone" in capsys.readouterr().err


def test_other_settings_are_another_sweep(swept: Path, parts: Any, capsys: Any) -> None:
    assert main(words(parts, swept, methods="lora,full", steps=3)) == 2
    assert "another sweep" in capsys.readouterr().err


def test_a_lost_cell_is_made_again_to_the_same_bytes(
    swept: Path, parts: Any, tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(swept, out)
    folder = out / "cells/dog-tiny-base-full-seed1234"
    before = (folder / "score/scores.json").read_bytes()
    shutil.rmtree(folder)
    assert main(words(parts, out, methods="lora,full")) == 0
    assert (folder / "score/scores.json").read_bytes().replace(
        str(out).encode(), str(swept).encode()
    ) == before


def test_a_lost_score_costs_no_training(swept: Path, parts: Any, tmp_path: Path) -> None:
    """Nor does a trained member of a stack train again because another one is lost."""
    out = tmp_path / "copy"
    shutil.copytree(swept, out)
    lost, *others = (out / f"cells/{name}-tiny-base-lora-seed1234" for name in TRIO.split(","))
    shutil.rmtree(lost)
    (others[0] / "cell.json").unlink()
    logs = {
        path: path.stat().st_mtime_ns for path in (folder / "run/log.jsonl" for folder in others)
    }
    assert main(words(parts, out, methods="lora,full")) == 0
    assert {path: path.stat().st_mtime_ns for path in logs} == logs
    assert json.loads((lost / "cell.json").read_text())["trained_together"] == 1
    assert len(list(out.glob("cells/*/cell.json"))) == 6


def test_a_stack_interrupted_while_it_leaves_its_runs_goes_on(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The members that have their runs by then stay in it, though they are done."""
    here = lambda tasks, out, workers: ((task, do(out, task)) for task in tasks)  # noqa: E731
    monkeypatch.setitem(engines.ENGINES, "local", here)
    leave = together.leave

    def breaks(job: Any, number: int, *rest: Any) -> None:
        if number == 1:
            raise KeyboardInterrupt
        leave(job, number, *rest)

    out = tmp_path / "out"
    with monkeypatch.context() as once:
        once.setattr(together, "leave", breaks)
        assert main(words(parts, out)) == 130
    assert len(list(out.glob("cells/*/run/manifest.json"))) == 1
    assert main(words(parts, out)) == 0
    facts = [json.loads(path.read_text()) for path in out.glob("cells/*/cell.json")]
    assert [fact["trained_together"] for fact in facts] == [3, 3, 3]


def test_a_bad_subject_costs_its_own_cell(parts: Any, tmp_path: Path, capsys: Any) -> None:
    """One of three stacked subjects has a broken photo: the other two are done, it is listed, and
    mended photos are tried again."""
    bad = tmp_path / "data/can"
    bad.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(4):
        scoring.picture(rng).save(bad / f"{number}.png")
    whole = (bad / "3.png").read_bytes()
    (bad / "3.png").write_bytes(whole[:100])
    command = words(parts, tmp_path / "out", data_root=tmp_path / "data")
    assert main(command) == 4
    said = capsys.readouterr().out
    assert "1 cells failed" in said and "can-tiny-base-lora-seed1234: " in said and "3.png" in said
    assert "| 2 of 3 |" in said
    assert "* can-tiny-base-lora-seed1234: " in (tmp_path / "out/table.md").read_text()
    result = json.loads((tmp_path / "out/arms/tiny-base-lora/scores.json").read_text())
    assert not result["complete"] and "can" in result["exclusions"][0]
    (bad / "3.png").write_bytes(whole)
    assert main(command) == 0
    assert "| 3 of 3 |" in capsys.readouterr().out
    facts = (tmp_path / "out/cells/can-tiny-base-lora-seed1234/cell.json").read_text()
    assert json.loads(facts)["trained_together"] == 1


def test_a_killed_sweep_goes_on(parts: Any, tmp_path: Path) -> None:
    """Killed with -9 in the middle of training: its worker ends too, and the next call finishes."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bksdm_tune", *words(parts, out, steps=60)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    logs: list[Path] = []
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(p.stat().st_size > 200 for p in logs):
        logs = list(out.glob("stacks/*/log.jsonl"))
        time.sleep(0.05)
    assert logs and process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert main(words(parts, out, steps=60)) == 0
    assert len(list(out.glob("cells/*/cell.json"))) == 3
    assert len(list(out.glob("stacks/*"))) == 1


def test_a_ray_cluster_survives_a_dead_worker(
    parts: Any, swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker is killed in mid-training; the scores are those of the local engine."""
    ray = pytest.importorskip("ray")
    out = tmp_path / "out"
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["tests", "."]))
    place = tempfile.mkdtemp(prefix="ray")  # pytest's own folders are too long for its sockets
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1",
        object_store_memory=80_000_000, _temp_dir=place,
    )  # fmt: skip
    killer = subprocess.Popen([sys.executable, __file__, str(out)])
    try:
        assert main(words(parts, out, engine="ray", stack=2)) == 0
        assert killer.wait(timeout=10) == 0, "no worker was killed"
    finally:
        killer.kill()
        ray.shutdown()
        shutil.rmtree(place, ignore_errors=True)
    for name in TRIO.split(","):
        place = f"cells/{name}-tiny-base-lora-seed1234/score/scores.json"
        ours, theirs = (json.loads((p / place).read_text()) for p in (swept, out))
        assert theirs["metrics"]["dino"]["macro"] == pytest.approx(
            ours["metrics"]["dino"]["macro"], abs=1e-4
        )


def kill_a_worker(out: Path) -> int:
    """Kill the first Ray worker that holds a lock below ``out``."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                opened = [os.readlink(path) for path in (folder / "fd").iterdir()]
                name = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if b"ray::" in name and any(path.startswith(f"{out}/stacks") for path in opened):
                os.kill(int(folder.name), signal.SIGKILL)
                return 0
        time.sleep(0.02)
    return 1


if __name__ == "__main__":
    sys.exit(kill_a_worker(Path(sys.argv[1])))
