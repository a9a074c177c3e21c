"""Finding, decoding and checking photos."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bksdm_tune.artifacts import sha256_file
from bksdm_tune.errors import DataError
from subjects import catalogue
from subjects.photos import check_photos, find_photos, open_photo, read_photos

ORIENTATION = 0x0112


def draw(path: Path, seed: int = 0, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 40, 5))
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was turned: what is on top belongs on the right
    image.save(tmp_path / "a.png", exif=exif)
    opened = open_photo(tmp_path / "a.png")
    assert opened.size == (20, 40)
    assert opened.getpixel((19, 20)) == (255, 255, 255) and opened.getpixel((0, 20)) == (0, 0, 0)


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 51)).save(tmp_path / "faint.png")
    assert open_photo(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_photo(tmp_path / "faint.png").getpixel((0, 0)) == (204, 204, 204)  # 255 * 0.8


def test_palette_transparency_lies_over_white(tmp_path: Path) -> None:
    Image.new("P", (8, 8), 0).save(tmp_path / "a.png", transparency=0)
    assert open_photo(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_divided_by_257(tmp_path: Path, suffix: str) -> None:
    pixels = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    opened = np.asarray(open_photo(tmp_path / f"a.{suffix}"))
    assert opened[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tiff"])
def test_truncated_photo_is_refused(tmp_path: Path, suffix: str) -> None:
    path = draw(tmp_path / f"a.{suffix}", size=(200, 200))
    assert open_photo(path).size == (200, 200)
    with pytest.raises(DataError, match="a[.]"):
        open_photo(truncate(path))


def test_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = draw(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 30 // 2 - 1)
    with pytest.raises(DataError, match="too many pixels"):
        open_photo(path)


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert open_photo(tmp_path / "a.webp").getpixel((0, 0)) == (255, 0, 0)


def test_photos_come_in_natural_order_and_strays_are_named(tmp_path: Path) -> None:
    for seed, name in enumerate(["10.jpg", "2.PNG", "1.jpeg", "b.webp", "A.bmp"]):
        draw(tmp_path / name, seed)
    for stray in (".DS_Store", "Thumbs.db", "notes.txt", "._1.jpg"):
        (tmp_path / stray).write_bytes(b"\0")
    draw(tmp_path / ".cache" / "x.jpg")
    (tmp_path / "manifest.json").write_text("{}")
    found = read_photos(tmp_path, minimum_side=30)
    names = [photo.path.name for photo in found.photos]
    assert names == ["1.jpeg", "2.PNG", "10.jpg", "A.bmp", "b.webp"]
    assert sorted(found.ignored) == [".DS_Store", "._1.jpg", ".cache/", "Thumbs.db", "notes.txt"]
    assert found.photos[0].size == (40, 30)
    assert found.photos[0].sha256 == sha256_file(tmp_path / "1.jpeg")


def test_one_report_names_every_bad_photo_and_no_good_one(tmp_path: Path) -> None:
    draw(tmp_path / "good.jpg", 1)
    (tmp_path / "hcopy.jpg").write_bytes((tmp_path / "good.jpg").read_bytes())
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "void.jpg").touch()
    truncate(draw(tmp_path / "half.jpg", 2))
    draw(tmp_path / "small.png", 3, size=(100, 29))
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError) as caught:
        read_photos(tmp_path, minimum_side=30)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[0].startswith("6 of 7 photos") and len(lines) == 7
    expected = {
        "gone.jpg": "No such file",
        "half.jpg": "truncated",
        "hcopy.jpg": "copy of good.jpg",
        "small.png": "100x29; the shorter side needs 30 pixels",
        "text.png": "is not a JPEG",
        "void.jpg": "is empty",
    }
    for line, (name, reason) in zip(lines[1:], expected.items(), strict=True):
        assert line.startswith(name) and reason in line


def test_no_photos_says_what_is_read_and_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "rex.heic").touch()
    (tmp_path / "10_rex").mkdir()
    with pytest.raises(DataError, match=r"No photos.*[.]jpg.*10_rex/, rex[.]heic"):
        read_photos(tmp_path, minimum_side=1)
    with pytest.raises(DataError, match="does not exist"):
        read_photos(tmp_path / "absent", minimum_side=1)


@pytest.mark.parametrize("layout", ["dog", "dataset/dog", "dreambooth/dog"])
def test_subject_is_found_by_its_whole_name(tmp_path: Path, layout: str) -> None:
    (tmp_path / layout).parent.joinpath("backpack_dog").mkdir(parents=True)
    assert find_photos("dog", tmp_path) is None
    (tmp_path / layout).mkdir()
    assert find_photos("dog", tmp_path) == tmp_path / layout


def test_data_root_then_environment_then_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BKSDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BKSDM_DATA", str(tmp_path / "env"))
    (tmp_path / "root").mkdir()
    places = [tmp_path / "cache/dreambooth/dog", tmp_path / "env/dog", tmp_path / "root/dog"]
    for place in places:
        place.mkdir(parents=True)
        assert find_photos("dog", tmp_path / "root") == place
    with pytest.raises(DataError, match="--data-root"):
        find_photos("dog", tmp_path / "absent")


def test_check_names_missing_changed_and_extra_photos(tmp_path: Path) -> None:
    photos = [draw(tmp_path / f"0{n}.jpg", n) for n in range(3)]
    hashes = tuple((path.name, sha256_file(path)) for path in photos)
    subject = replace(catalogue.SUBJECTS["dog"], photos=hashes)
    assert check_photos(tmp_path, subject) == []
    photos[0].unlink()
    draw(photos[1], seed=9)
    draw(tmp_path / "extra.png")
    (tmp_path / "notes.txt").touch()
    problems = check_photos(tmp_path, subject)
    assert [Path(problem.split(":")[0]).name for problem in problems] == [
        "00.jpg",
        "01.jpg",
        "extra.png",
    ]
