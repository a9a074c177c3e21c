"""Fetching whole subjects from a server, a folder and archives, with a catalogue of two."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from bksdm_tune.artifacts import verify_manifest
from bksdm_tune.errors import DataError, UsageError
from mirror import Mirror
from subjects import catalogue, command
from subjects.catalogue import SUBJECTS, Subject
from subjects.download import Patience
from subjects.fetch import fetch

PATIENCE = Patience(attempts=2, timeout=0.3, sleep=lambda seconds: None)
CREDITS = "references_and_licenses.txt"


def picture(color: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (color, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = {
    "dog": {"00.jpg": picture(1), "01.jpg": picture(2)},
    "backpack_dog": {"00.jpg": picture(3)},
}


def write_dataset(folder: Path) -> Path:
    for subject, photos in PICTURES.items():
        (folder / subject).mkdir(parents=True)
        for name, data in photos.items():
            (folder / subject / name).write_bytes(data)
    (folder / CREDITS).write_text("credit: someone")
    return folder


@pytest.fixture(autouse=True)
def tiny_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("BKSDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BKSDM_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tiny = {}
    for name, photos in PICTURES.items():
        hashes = tuple((file, hashlib.sha256(data).hexdigest()) for file, data in photos.items())
        tiny[name] = Subject(name, catalogue.CLASS_NOUNS[name], name == "dog", hashes)
    published = dict(SUBJECTS)
    SUBJECTS.clear()
    SUBJECTS.update(tiny)
    yield
    SUBJECTS.clear()
    SUBJECTS.update(published)  # in the order of the dataset again


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    with Mirror(write_dataset(tmp_path / "served")) as mirror:
        yield mirror


def assert_whole(root: Path, names: tuple[str, ...] = ("dog", "backpack_dog")) -> None:
    for name in names:
        for file, data in PICTURES[name].items():
            assert (root / name / file).read_bytes() == data
        assert verify_manifest(root / name, "photos")["config"]["subject"] == name
    assert sorted(p.name for p in root.iterdir() if p.name != ".lock") == sorted([*names, CREDITS])


def test_all_subjects_come_from_a_server_once(tmp_path: Path, mirror: Mirror) -> None:
    assert fetch(source=mirror.url, out=tmp_path / "out", patience=PATIENCE) == tmp_path / "out"
    assert_whole(tmp_path / "out")
    assert len(mirror.requests) == 4
    fetch(source=mirror.url, out=tmp_path / "out", patience=PATIENCE)
    assert len(mirror.requests) == 4


def test_only_the_named_subject_comes_and_into_the_cache(tmp_path: Path, mirror: Mirror) -> None:
    fetch(["dog"], mirror.url, patience=PATIENCE)
    assert_whole(tmp_path / "cache/dreambooth", ("dog",))


def test_faults_on_the_way_are_survived(tmp_path: Path, mirror: Mirror) -> None:
    mirror.faults["dog/00.jpg"] = ["truncate", "ignore range"]
    mirror.faults["dog/01.jpg"] = ["stall"]
    mirror.faults["backpack_dog/00.jpg"] = [503]
    fetch(source=mirror.url, out=tmp_path, patience=PATIENCE)
    assert (tmp_path / "dog/01.jpg").read_bytes() == PICTURES["dog"]["01.jpg"]


def test_a_failed_subject_does_not_appear_and_the_next_call_goes_on(
    tmp_path: Path, mirror: Mirror
) -> None:
    out = tmp_path / "out"
    mirror.faults["dog/01.jpg"] = ["wrong"]
    with pytest.raises(DataError, match=r"(?s)dog/01.jpg does not hold.*--from"):
        fetch(source=mirror.url, out=out, patience=PATIENCE)
    assert not (out / "dog").exists()
    fetch(source=mirror.url, out=out, patience=PATIENCE)
    assert_whole(out)
    assert len(mirror.ranges("dog/00.jpg")) == 1


def test_a_mirror_without_credits_still_serves(tmp_path: Path, mirror: Mirror) -> None:
    (mirror.folder / CREDITS).unlink()
    fetch(source=mirror.url, out=tmp_path / "out", patience=PATIENCE)
    assert (tmp_path / "out/dog/manifest.json").exists()


def test_a_damaged_download_is_replaced(tmp_path: Path, mirror: Mirror) -> None:
    fetch(source=mirror.url, out=tmp_path / "out", patience=PATIENCE)
    (tmp_path / "out/dog/00.jpg").write_bytes(b"damaged")
    fetch(source=mirror.url, out=tmp_path / "out", patience=PATIENCE)
    assert_whole(tmp_path / "out")


def test_photos_of_somebody_else_are_never_replaced(tmp_path: Path, mirror: Mirror) -> None:
    (tmp_path / "out/dog").mkdir(parents=True)
    (tmp_path / "out/dog/00.jpg").write_bytes(b"my own dog")
    with pytest.raises(DataError, match="(?s)in the way.*00.jpg: differs.*01.jpg: missing"):
        fetch(["dog"], mirror.url, tmp_path / "out", PATIENCE)
    assert (tmp_path / "out/dog/00.jpg").read_bytes() == b"my own dog"
    assert mirror.requests == []


@pytest.mark.parametrize("layout", ["", "dataset"])
def test_a_folder_serves_as_source(tmp_path: Path, layout: str) -> None:
    write_dataset(tmp_path / "copy" / layout)
    fetch(source=str(tmp_path / "copy"), out=tmp_path / "out")
    assert_whole(tmp_path / "out")


def test_a_folder_with_another_photo_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "copy")
    (tmp_path / "copy/dog/01.jpg").write_bytes(picture(9))
    with pytest.raises(DataError, match="dog/01.jpg differs"):
        fetch(["dog"], str(tmp_path / "copy"), tmp_path / "out")
    (tmp_path / "copy/dog/01.jpg").unlink()
    with pytest.raises(DataError, match="no dog/01.jpg"):
        fetch(["dog"], str(tmp_path / "copy"), tmp_path / "out")


def pack(folder: Path, suffix: str) -> Path:
    write_dataset(folder / "dreambooth-main/dataset")
    kind = "zip" if suffix == "zip" else "gztar"
    return Path(shutil.make_archive(str(folder / "photos"), kind, folder, "dreambooth-main"))


@pytest.mark.parametrize("suffix", ["zip", "tar.gz"])
@pytest.mark.parametrize("remote", [False, True])
def test_an_archive_serves_as_source(
    tmp_path: Path, mirror: Mirror, suffix: str, remote: bool
) -> None:
    archive = pack(tmp_path / "packed", suffix)
    assert archive.name == f"photos.{suffix}"
    shutil.copy(archive, mirror.folder)
    mirror.faults[archive.name] = ["truncate"]
    source = f"{mirror.url}/{archive.name}" if remote else str(archive)
    fetch(source=source, out=tmp_path / "out", patience=PATIENCE)
    assert_whole(tmp_path / "out")


@pytest.mark.parametrize("suffix", ["zip", "tar.gz"])
def test_a_hostile_archive_writes_nothing_outside(tmp_path: Path, suffix: str) -> None:
    names = ["../../../dog/00.jpg", "/dog/01.jpg", "../evil.txt", "backpack_dog/00.jpg"]
    contents = [*PICTURES["dog"].values(), b"evil", picture(3)]
    archive = tmp_path / "deep/down/here" / f"a.{suffix}"
    archive.parent.mkdir(parents=True)
    if suffix == "zip":
        with zipfile.ZipFile(archive, "w") as zipped:
            for name, data in zip(names, contents, strict=True):
                zipped.writestr(name, data)
    else:
        with tarfile.open(archive, "w:gz") as tar:
            link = tarfile.TarInfo("dog/00.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
            tar.addfile(link)
            for name, data in zip(names, contents, strict=True):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    fetch(["dog"], str(archive), tmp_path / "deep/down/out")
    assert sorted(os.listdir(tmp_path / "deep/down/out")) == [".lock", "dog"]
    assert os.listdir(tmp_path) == ["deep"] and sorted(os.listdir(tmp_path / "deep/down")) == [
        "here",
        "out",
    ]


def test_a_broken_archive_is_fetched_anew_next_time(tmp_path: Path, mirror: Mirror) -> None:
    archive = pack(tmp_path / "packed", "zip")
    (mirror.folder / "photos.zip").write_bytes(archive.read_bytes()[:-40])
    for _ in range(2):
        with pytest.raises(DataError, match="(?s)cannot be unpacked.*--from"):
            fetch(source=f"{mirror.url}/photos.zip", out=tmp_path / "out", patience=PATIENCE)
    shutil.copy(archive, mirror.folder)
    fetch(source=f"{mirror.url}/photos.zip", out=tmp_path / "out", patience=PATIENCE)
    assert_whole(tmp_path / "out")


def test_an_unreachable_source_says_what_was_tried_and_what_to_type(tmp_path: Path) -> None:
    with Mirror(tmp_path) as gone:
        url = gone.url
    with pytest.raises(DataError, match=rf"(?s){url}/dog/00.jpg.*--from URL\|DIR\|ARCHIVE"):
        fetch(["dog"], url, tmp_path / "out", PATIENCE)
    with pytest.raises(UsageError, match="absent.zip"):
        fetch(["dog"], str(tmp_path / "absent.zip"), tmp_path / "out", PATIENCE)


def test_verbs_list_fetch_and_check(
    tmp_path: Path, mirror: Mirror, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--data-root", str(tmp_path / "out")]
    assert command.main(["fetch", "dog", "--from", mirror.url, *root]) == 0
    capsys.readouterr()
    assert command.main(["list", "--json", *root]) == 0
    dog, other = json.loads(capsys.readouterr().out)
    assert dog == {
        "name": "dog",
        "class_noun": "dog",
        "live": True,
        "photos": 2,
        "found": str(tmp_path / "out/dog"),
    }
    assert other["name"] == "backpack_dog" and other["found"] == "illustrated"
    assert command.main(["check", *root]) == 0
    assert "backpack_dog        not on disk" in capsys.readouterr().out
    for name in PICTURES["dog"]:
        (tmp_path / "out/dog" / name).write_bytes(b"damaged")
    with pytest.raises(DataError, match="(?s)2 problems.*00.jpg.*01.jpg"):
        command.main(["check", *root])
