"""What lies under the app: verdicts on photos, the library, the queue of trainings."""

from __future__ import annotations

import json
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from bksdm_tune.app import uploads
from bksdm_tune.app.jobs import (
    CANCELLED,
    DONE,
    FAILED,
    INTERRUPTED,
    PAUSED,
    QUEUED,
    RUNNING,
    Job,
    Jobs,
    alive,
    progress,
)
from bksdm_tune.app.library import Library, slug
from bksdm_tune.artifacts import locked, write_manifest
from bksdm_tune.errors import UsageError
from tiny import make_pipeline


def photo(folder: Path, name: str, seed: int = 0, side: int = 200) -> Path:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (12, 12, 3), np.uint8)
    path = folder / name
    Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST).save(path)
    return path


def test_every_photo_has_its_verdict(tmp_path: Path) -> None:
    good = photo(tmp_path, "good.png")
    twin = tmp_path / "twin.jpg"
    Image.open(good).save(twin, quality=60)
    small = photo(tmp_path, "small.png", 1, side=20)
    blurred = tmp_path / "blurred.png"
    Image.open(photo(tmp_path, "x.png", 2)).filter(ImageFilter.GaussianBlur(9)).save(blurred)
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photo(tmp_path, "y.png", 3)).save(turned, exif=exif)
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:300])
    empty = tmp_path / "empty.jpg"
    empty.write_bytes(b"")
    html = tmp_path / "page.jpg"
    html.write_text("<html><script>alert(1)</script></html>")
    found = uploads.examine([good, twin, small, blurred, turned, cut, empty, html], 32)
    texts = {verdict.name: verdict.text for verdict in found}
    assert texts["good.png"] == "good"
    assert "almost the same as good.png" in texts["twin.jpg"]
    assert "the shorter side needs 32 pixels" in texts["small.png"]
    assert texts["blurred.png"] == "looks blurred"
    assert texts["turned.jpg"] == "was turned as the camera said"
    for name in ("cut.png", "empty.jpg", "page.jpg"):
        assert texts[name].startswith("not used: "), texts[name]
    folder = uploads.keep(found, tmp_path / "kept")
    assert sorted(path.name for path in folder.iterdir()) == [
        "00.png",
        "01.jpg",
        "02.png",
        "03.jpg",
    ]
    assert uploads.examine([good], 32)[0].size == (200, 200)


def hostile(folder: Path) -> Iterator[Path]:
    """Files that are not the pictures they are named."""
    svg = folder / "a.svg"
    svg.write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>')
    yield svg
    bomb = folder / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(bomb)  # 50 MB decoded, few bytes
    yield bomb
    pickled = folder / "p.png"
    pickled.write_bytes(pickle.dumps({"a": 1}))
    yield pickled
    folder_like = folder / "dir.png"
    folder_like.mkdir()
    yield folder_like
    yield folder / "gone.png"
    eps = folder / "e.png"
    eps.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    yield eps


def test_hostile_files_are_verdicts_too(tmp_path: Path) -> None:
    paths = list(hostile(tmp_path))
    found = uploads.examine(paths, 32)
    assert len(found) == len(paths) == 6 and all(verdict.bad for verdict in found)
    with pytest.raises(UsageError, match="0 of 6 photos can be used"):
        uploads.keep(found, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    with pytest.raises(UsageError, match="21 photos are too many"):
        uploads.examine([photo(tmp_path, "q.png")] * 21, 32)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Rex der Große", "rex-der-groe"), ("../../etc/passwd", "etc-passwd"), ("a/b\\c", "a-b-c"),
     ("..hidden", "hidden"), ("x" * 200, "x" * 60), ("C:\\con", "c-con"), ("a\0b\n", "a-b")],
)  # fmt: skip
def test_names_become_slugs(name: str, expected: str) -> None:
    assert slug(name) == expected


@pytest.mark.parametrize("name", ["", "..", "///", "\0"])
def test_names_of_which_nothing_is_left(name: str) -> None:
    with pytest.raises(UsageError, match="a letter or a digit"):
        slug(name)


def make_model(library: Library, name: str) -> Path:
    folder = library.free_folder(name)
    folder.mkdir()
    (folder / "weights").write_text("x" * 100)
    results = {"trigger": "sks dog", "steps": 3}
    write_manifest(folder, "dreambooth-lora", {}, {"backbone": {"name": "bk"}}, results)
    return folder


def test_the_library_lists_renames_and_deletes(tmp_path: Path) -> None:
    library = Library(tmp_path / "library")
    first, second = make_model(library, "Rex"), make_model(library, "Rex")
    assert (first.name, second.name) == ("rex", "rex-2")
    (library.root / "other").mkdir()
    (library.root / "other/manifest.json").write_text("{")
    assert {model.slug for model in library.models()} == {"rex", "rex-2"}
    library.rename("rex", "  My   dog ")
    assert library.get("rex").title == "My dog" and library.get("rex").folder == first
    assert library.get("rex").trigger == "sks dog" and library.get("rex").bytes >= 100
    with locked(second), pytest.raises(UsageError, match="Another run"):
        library.delete("rex-2")
    library.delete("rex-2")
    assert not second.exists() and [m.slug for m in library.models()] == ["rex"]
    for wrong in ("../library/rex", "/etc", "other", "rex/../rex", ".jobs"):
        with pytest.raises(UsageError, match="no such model"):
            library.delete(wrong)
    assert first.exists()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("backbone") / "tiny", size="tiny")


def make_job(backbone: Path, library: Path, name: str, steps: int, **more: Any) -> Job:
    run = library / name
    words = ["dreambooth", "--subject", "dog", "--lora", "--backbone", str(backbone)]
    words += ["--steps", str(steps), "--preview-prompts", "--checkpoint-every", "10"]
    words += ["--out", str(run)]
    return Job(name, tuple(words), run, steps, **more)


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    jobs = Jobs(tmp_path)
    jobs.start()
    yield jobs
    jobs.stop()
    for job in jobs.all():
        if job.pid is not None and alive(job):
            os.kill(job.pid, signal.SIGKILL)


def wait(what: Callable[[], Any], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def test_jobs_run_one_after_the_other(jobs: Jobs, backbone: Path, tmp_path: Path) -> None:
    first = jobs.add(make_job(backbone, tmp_path, "one", 4))
    second = jobs.add(make_job(backbone, tmp_path, "two", 4))
    wait(lambda: jobs.get(first.id).state == RUNNING)
    assert jobs.get(second.id).state == QUEUED
    wait(lambda: jobs.get(second.id).state == DONE)
    assert jobs.get(first.id).state == DONE
    seen = progress(jobs.get(first.id))
    assert seen.step == 4 and [step for step, _ in seen.losses] == [1, 2, 3, 4]
    assert "bksdm-tune dreambooth --subject dog" in first.command


def test_a_paused_job_goes_on(jobs: Jobs, backbone: Path, tmp_path: Path) -> None:
    job = jobs.add(make_job(backbone, tmp_path, "one", 400))
    wait(lambda: progress(jobs.get(job.id)).step > 3)
    jobs.end(job.id, PAUSED)
    wait(lambda: jobs.get(job.id).pid is None)
    assert jobs.get(job.id).state == PAUSED
    reached = progress(jobs.get(job.id)).step
    jobs.resume(job.id)
    wait(lambda: progress(jobs.get(job.id)).step > reached)
    jobs.end(job.id, CANCELLED)
    wait(lambda: jobs.get(job.id).pid is None)
    steps = [step for step, _ in progress(jobs.get(job.id)).losses]
    assert steps == list(range(1, len(steps) + 1))  # went on, did not begin again


def test_an_app_that_died_finds_its_job_again(backbone: Path, tmp_path: Path) -> None:
    """The first app's thread stops without a word, as at kill -9; its training goes on."""
    first = Jobs(tmp_path)
    first.start()
    job = first.add(make_job(backbone, tmp_path, "one", 60))
    wait(lambda: progress(first.get(job.id)).step > 2)
    first.stop()
    first.thread.join()
    second = Jobs(tmp_path)
    second.start()
    assert second.get(job.id).state == RUNNING and alive(second.get(job.id))
    wait(lambda: second.get(job.id).state == DONE)
    second.stop()


def test_a_job_that_died_with_the_app_says_so(backbone: Path, tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    gone = make_job(backbone, tmp_path, "one", 5, state=RUNNING, pid=2**22 - 1)
    jobs._write(gone)
    mine = replace(gone, id="b", pid=os.getpid())  # a number that was used again
    jobs._write(mine)
    jobs.start()
    assert [job.state for job in jobs.all()] == [INTERRUPTED, INTERRUPTED]
    jobs.stop()


def test_a_failed_job_says_why(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.add(Job("x", ("dreambooth", "--subject", "dgo", "--out", str(tmp_path / "x")),
                       tmp_path / "x", 5))  # fmt: skip
    wait(lambda: jobs.get(job.id).state == FAILED)
    error = jobs.get(job.id).error
    assert error is not None and "Did you mean dog" in error and "Traceback" not in error
    jobs.forget(job.id)
    assert jobs.all() == [] and not list(jobs.folder.iterdir())


def test_the_queue_has_an_end(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)  # not started: everything waits
    for number in range(20):
        jobs.add(Job(str(number), ("x",), tmp_path / str(number), 1))
    with pytest.raises(UsageError, match="20 jobs are waiting"):
        jobs.add(Job("21", ("x",), tmp_path / "21", 1))
    jobs.end(jobs.all()[0].id, CANCELLED)
    jobs.add(Job("21", ("x",), tmp_path / "21", 1))
    (jobs.folder / "bad.json").write_text(json.dumps({"title": 1}))
    assert len(jobs.all()) == 21
