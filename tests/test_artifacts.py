"""Manifests are written last, caches survive concurrent writers, locks die with their process."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bksdm_tune import artifacts
from bksdm_tune.artifacts import (
    MANIFEST,
    atomic_folder,
    cached,
    content_key,
    locked,
    read_manifest,
    verify_manifest,
    write_manifest,
    write_text_atomic,
)
from bksdm_tune.errors import DataError, UsageError

# sha256 of the three bytes "abc", FIPS 180-2 appendix B.1.
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    (folder / "weights").write_bytes(b"abc")
    (folder / "samples" / "0.png").write_bytes(b"picture")
    (folder / ".lock").touch()
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "state").write_bytes(b"to resume from")
    write_manifest(folder, "run", {"steps": 3}, parents={"backbone": "x"}, results={"loss": 0.5})
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_manifest_says_what_the_folder_holds(artifact: Path) -> None:
    manifest = json.loads((artifact / MANIFEST).read_text())
    assert manifest["files"] == {
        "weights": {"bytes": 3, "sha256": ABC},
        "samples/0.png": {"bytes": 7, "sha256": manifest["files"]["samples/0.png"]["sha256"]},
    }
    kept = {key: manifest[key] for key in ("kind", "config", "parents", "results")}
    assert kept == {
        "kind": "run",
        "config": {"steps": 3},
        "parents": {"backbone": "x"},
        "results": {"loss": 0.5},
    }
    assert {"torch", "diffusers"} <= manifest["versions"].keys()


def test_a_manifest_does_not_describe_itself_when_written_twice(artifact: Path) -> None:
    first = read_manifest(artifact)
    write_manifest(artifact, "run", {"steps": 3}, parents={"backbone": "x"}, results={"loss": 0.5})
    assert read_manifest(artifact) == first


def test_a_failed_write_leaves_the_old_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    write_text_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["state.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with atomic_folder(target) as scratch:
        (scratch / "a").write_text("a")
        assert not target.exists()
    assert names(target) == ["a"]
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "other") as scratch:
        (scratch / "a").write_text("a")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["deep"]


def test_verify_passes_a_whole_folder_and_ignores_strangers(artifact: Path) -> None:
    (artifact / ".DS_Store").touch()
    assert verify_manifest(artifact, "run")["config"] == {"steps": 3}


def test_verify_names_every_damaged_file(artifact: Path) -> None:
    (artifact / "weights").write_bytes(b"abd")  # the same length
    (artifact / "samples" / "0.png").unlink()
    with pytest.raises(DataError) as error:
        verify_manifest(artifact)
    assert "weights: differs" in str(error.value)
    assert "samples/0.png: missing" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a finished folder"),
        ("{", "cannot be read"),
        ("[]", "is not a bksdm-tune manifest"),
        ('{"kind": "cache", "files": {}}', "holds a cache; a run is needed"),
    ],
)
def test_what_is_no_artifact_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path, "run")


def test_equal_facts_give_equal_keys() -> None:
    assert content_key({"a": 1, "b": [2]}) == content_key({"b": [2], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})


def test_cached_makes_once(own_cache: Path) -> None:
    made: list[Path] = []
    first = cached("latents", {"image": 1}, made.append)
    assert cached("latents", {"image": 1}, made.append) == first
    assert cached("latents", {"image": 2}, made.append) != first
    assert len(made) == 2
    assert verify_manifest(first, "latents")["config"] == {"image": 1}


def test_cached_leaves_nothing_behind_a_failure(own_cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cached("latents", {}, fail)
    assert names(own_cache / "latents") == []


def test_cached_replaces_a_folder_without_a_manifest(own_cache: Path) -> None:
    folder = cached("latents", {}, lambda folder: None)
    (folder / MANIFEST).unlink()
    (folder / "stale").touch()
    assert names(cached("latents", {}, lambda folder: (folder / "new").touch())) == [
        MANIFEST,
        "new",
    ]


def test_cached_never_removes_what_another_writer_finished(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[Path] = []
    remove = artifacts.shutil.rmtree

    def spy(path: Path, **kwargs: Any) -> None:
        removed.append(path)
        remove(path, **kwargs)

    monkeypatch.setattr(artifacts.shutil, "rmtree", spy)
    folder = cached("latents", {}, lambda folder: None)
    assert removed
    assert folder not in removed


def _write_together(cache: str, barrier: Any, results: Any) -> None:
    os.environ["BKSDM_CACHE"] = cache

    def make(folder: Path) -> None:
        (folder / "data").write_bytes(b"x" * 100_000)
        barrier.wait(timeout=30)

    results.put(cached("latents", {}, make))


def test_concurrent_writers_end_with_one_whole_folder(own_cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    arguments = (str(own_cache), barrier, results)
    writers = [context.Process(target=_write_together, args=arguments) for _ in range(3)]
    for writer in writers:
        writer.start()
    folders = {results.get(timeout=60) for _ in writers}
    for writer in writers:
        writer.join(timeout=30)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    (folder,) = folders
    assert verify_manifest(folder)["files"]["data"]["bytes"] == 100_000
    assert names(own_cache / "latents") == [folder.name]


HOLD = """
import sys
from pathlib import Path
from bksdm_tune.artifacts import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_refuses_a_second_run_and_dies_with_its_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="Another run is writing"), locked(folder):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(folder):
        assert folder.is_dir()


def test_a_lock_ends_with_its_block(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path):
            pass


def test_a_file_where_the_run_folder_goes_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match="a file is in its way"), locked(path):
            pass
