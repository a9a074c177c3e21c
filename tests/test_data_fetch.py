"""``bksdm-tune data``: published sets from a local server that misbehaves."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bksdm_tune.artifacts import verify_manifest
from bksdm_tune.cli import main
from distill import fetch as fetching
from distill.data import open_source
from distill.fetch import DATA_SETS, fetch
from mirror import Mirror
from pairs import image_folder
from subjects.download import Patience

COUNT = 5
FAST = Patience(attempts=5, timeout=0.3, sleep=lambda seconds: None)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store laid out as the publisher's, its 11k set five pictures long."""
    folder = tmp_path / "store"
    archive = folder / DATA_SETS["laion-11k"].files[0]
    archive.parent.mkdir(parents=True)
    pairs = image_folder(tmp_path / "preprocessed_11k", COUNT)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(pairs, "preprocessed_11k/train")
    small = replace(DATA_SETS["laion-11k"], rows=COUNT)
    monkeypatch.setitem(fetching.DATA_SETS, "laion-11k", small)
    return folder


def test_a_set_is_fetched_through_faults_and_can_be_trained_on(store: Path, tmp_path: Path) -> None:
    file = DATA_SETS["laion-11k"].files[0]
    with Mirror(store) as mirror:
        mirror.faults[file] = ["truncate", 503, "stall"]
        folder = fetch("laion-11k", mirror.url, tmp_path / "data", FAST)
        assert len(mirror.ranges(file)) == 4
        assert fetch("laion-11k", mirror.url, tmp_path / "data", FAST) == folder
        assert len(mirror.ranges(file)) == 4
    verify_manifest(folder, "data")
    assert open_source(str(folder)).size == COUNT
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_source_that_is_gone_is_said_to_be_gone(store: Path, tmp_path: Path) -> None:
    with Mirror(store) as mirror, pytest.raises(ValueError, match="taken it down.*--from"):
        fetch("laion-212k", mirror.url, tmp_path / "data", FAST)
    assert not (tmp_path / "data").exists()


def test_a_set_with_missing_rows_or_pictures_is_refused(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        fetching.DATA_SETS, "laion-11k", replace(DATA_SETS["laion-11k"], rows=COUNT + 1)
    )
    with pytest.raises(ValueError, match="has 6 rows; this one has 5"):
        fetch("laion-11k", str(store), tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["../../evil", "{}/evil"])
def test_an_archive_cannot_write_outside(store: Path, tmp_path: Path, name: str) -> None:
    archive = store / DATA_SETS["laion-11k"].files[0]
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo(name.format(tmp_path))
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(ValueError, match="cannot be unpacked"):
        fetch("laion-11k", str(store), tmp_path / "data")
    assert not list(tmp_path.rglob("evil"))


def test_captions_and_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(fetching.DATA_SETS, "coco-30k", replace(DATA_SETS["coco-30k"], rows=1))
    store = tmp_path / "store"
    store.mkdir()
    (store / "metadata.csv").write_text("file_name,text\na.jpg,a dog\n")
    np.savez(store / "real_im256.npz", mu=np.zeros(4), sigma=np.eye(4))
    words = ["data", "fetch", "coco-30k", "--from", str(store), "--out", str(tmp_path / "coco")]
    assert main(words) == 0
    assert f"--captions {tmp_path / 'coco/metadata.csv'}" in capsys.readouterr().out
    (store / "real_im256.npz").write_bytes(b"<html>moved</html>")
    assert main([*words[:-1], str(tmp_path / "page")]) == 3
    assert "no .npz with mu and sigma" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()
    assert main(["data", "fetch", "laion-5b"]) == 2
    assert main(["data", "list"]) == 0
    assert "2,256,472 rows" in capsys.readouterr().out
