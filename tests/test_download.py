"""One file from a server that truncates, stalls, lies, ignores ranges or is not there."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from bksdm_tune.errors import DataError
from mirror import Mirror
from subjects.download import CHUNK, Patience, download

BYTES = random.Random(0).randbytes(1_000_000)
SHA256 = hashlib.sha256(BYTES).hexdigest()


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "served").mkdir()
    (tmp_path / "served/a.bin").write_bytes(BYTES)
    with Mirror(tmp_path / "served") as mirror:
        yield mirror


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def patience(waits: list[float]) -> Patience:
    return Patience(attempts=3, timeout=0.3, sleep=waits.append)


def left(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


def test_an_honest_server_is_asked_once(tmp_path: Path, mirror: Mirror, patience: Patience) -> None:
    target = tmp_path / "out/a.bin"
    download(f"{mirror.url}/a.bin", target, SHA256, patience)
    download(f"{mirror.url}/a.bin", target, SHA256, patience)
    assert target.read_bytes() == BYTES and left(target.parent) == ["a.bin"]
    assert mirror.ranges("a.bin") == [None]


@pytest.mark.parametrize("fault", ["truncate", "stall"])
def test_a_broken_transfer_goes_on_where_it_stopped(
    tmp_path: Path, mirror: Mirror, patience: Patience, fault: str
) -> None:
    mirror.faults["a.bin"] = [fault]
    download(f"{mirror.url}/a.bin", tmp_path / "a.bin", SHA256, patience)
    assert (tmp_path / "a.bin").read_bytes() == BYTES
    first, second = mirror.ranges("a.bin")
    assert first is None and second is not None
    assert 500_000 - CHUNK < int(second[len("bytes=") : -1]) <= 500_000


def test_progress_renews_patience(
    tmp_path: Path, mirror: Mirror, patience: Patience, waits: list[float]
) -> None:
    mirror.faults["a.bin"] = ["truncate"] * 5
    download(f"{mirror.url}/a.bin", tmp_path / "a.bin", SHA256, patience)
    assert (tmp_path / "a.bin").read_bytes() == BYTES
    assert waits == [1] * 5


@pytest.mark.parametrize("fault", ["ignore range", "other range"])
def test_a_server_without_ranges_still_serves(
    tmp_path: Path, mirror: Mirror, patience: Patience, fault: str
) -> None:
    mirror.faults["a.bin"] = ["truncate", fault]
    download(f"{mirror.url}/a.bin", tmp_path / "a.bin", SHA256, patience)
    assert (tmp_path / "a.bin").read_bytes() == BYTES


def test_wrong_bytes_are_removed_and_named(
    tmp_path: Path, mirror: Mirror, patience: Patience
) -> None:
    mirror.faults["a.bin"] = ["wrong"]
    with pytest.raises(DataError, match="a.bin does not hold the expected bytes"):
        download(f"{mirror.url}/a.bin", tmp_path / "out/a.bin", SHA256, patience)
    assert left(tmp_path / "out") == [] and len(mirror.requests) == 1


@pytest.mark.parametrize("old", [b"of another file", BYTES + b"more", b"x" * len(BYTES)])
def test_a_part_of_another_file_costs_one_fresh_start(
    tmp_path: Path, mirror: Mirror, patience: Patience, old: bytes
) -> None:
    (tmp_path / "a.bin.part").write_bytes(old)
    download(f"{mirror.url}/a.bin", tmp_path / "a.bin", SHA256, patience)
    assert (tmp_path / "a.bin").read_bytes() == BYTES
    assert mirror.ranges("a.bin") == [f"bytes={len(old)}-", None]


def test_a_complete_part_is_not_fetched_again(
    tmp_path: Path, mirror: Mirror, patience: Patience
) -> None:
    (tmp_path / "a.bin.part").write_bytes(BYTES)
    download(f"{mirror.url}/a.bin", tmp_path / "a.bin", SHA256, patience)
    assert (tmp_path / "a.bin").read_bytes() == BYTES and len(mirror.requests) == 1


def test_a_part_too_long_for_the_file_is_not_taken_for_it_without_a_hash(
    tmp_path: Path, mirror: Mirror, patience: Patience
) -> None:
    (tmp_path / "a.bin.part").write_bytes(BYTES + b"more")
    download(f"{mirror.url}/a.bin", tmp_path / "a.bin", None, patience)
    assert (tmp_path / "a.bin").read_bytes() == BYTES


def test_a_file_that_is_not_there_is_not_asked_for_again(
    tmp_path: Path, mirror: Mirror, patience: Patience
) -> None:
    with pytest.raises(DataError, match="b.bin.*404"):
        download(f"{mirror.url}/b.bin", tmp_path / "b.bin", SHA256, patience)
    assert len(mirror.requests) == 1


def test_a_busy_server_is_asked_again_after_growing_waits(
    tmp_path: Path, mirror: Mirror, patience: Patience, waits: list[float]
) -> None:
    mirror.faults["a.bin"] = [503, 429]
    download(f"{mirror.url}/a.bin", tmp_path / "a.bin", SHA256, patience)
    assert waits == [2, 4]
    mirror.faults["a.bin"] = [503] * 9
    with pytest.raises(DataError, match="3 attempts.*503"):
        download(f"{mirror.url}/a.bin", tmp_path / "b.bin", SHA256, patience)
    assert waits == [2, 4, 2, 4] and len(mirror.requests) == 6


def test_an_absent_server_is_an_error_with_its_address(tmp_path: Path, patience: Patience) -> None:
    with Mirror(tmp_path) as gone:
        url = gone.url
    with pytest.raises(DataError, match=url):
        download(f"{url}/a.bin", tmp_path / "a.bin", SHA256, patience)


def test_an_unwritable_place_is_an_error_with_the_path(
    tmp_path: Path, mirror: Mirror, patience: Patience
) -> None:
    (tmp_path / "blocked").touch()
    with pytest.raises(DataError, match="blocked/a.bin cannot be written"):
        download(f"{mirror.url}/a.bin", tmp_path / "blocked/a.bin", SHA256, patience)
