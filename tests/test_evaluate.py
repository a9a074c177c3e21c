"""``bksdm-tune evaluate`` on a tiny model with the pocket encoders, and ``compare``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bksdm_tune import processes
from bksdm_tune.cli import main
from bksdm_tune.evaluate import pictures
from bksdm_tune.evaluate.pictures import keep, read_captions
from bksdm_tune.evaluate.results import Metric, read_results, read_rows, write_results
from bksdm_tune.pipeline import Shot
from bksdm_tune.pocket import encoder
from pairs import image_folder
from tiny import make_pipeline

COUNT = 4


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captions") / "metadata.csv"
    lines = [f"{i}.png,a red dog {i}" for i in range(6)]
    path.write_text("\n".join(["file_name,text", *lines]))
    return path


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("real") / "pictures", count=9)


def run(backbone: Path, captions: Path, out: Path, *flags: str) -> int:
    few = ["--n", str(COUNT), "--steps", "2", "--extractors", "pocket"]
    where = ["--captions", str(captions), "--out", str(out)]
    return main(["evaluate", str(backbone), *where, *few, *flags])


@pytest.fixture(scope="module")
def scored(
    tmp_path_factory: pytest.TempPathFactory, captions: Path, real: Path
) -> tuple[Path, Path]:
    """A teacher's evaluation and its student's beside it."""
    folder = tmp_path_factory.mktemp("scored")
    teacher = make_pipeline(folder / "teacher-model")
    student = make_pipeline(folder / "student-model", seed=3, size="tiny")
    assert run(teacher, captions, folder / "teacher", "--real", str(real)) == 0
    more = ["--real", str(real), "--teacher", str(folder / "teacher"), "--batch-size", "1"]
    assert run(student, captions, folder / "student", *more) == 0
    return folder / "teacher", folder / "student"


def test_pocket_encoders_are_shipped() -> None:
    for name in ("clip", "looks"):
        assert (encoder(name) / "config.json").is_file()


def test_results_say_what_was_measured(scored: tuple[Path, Path], real: Path) -> None:
    result = read_results(scored[1])
    assert result["counts"] == {"generated": COUNT, "real": 9}
    assert result["protocol"]["extractors"]["frechet"]["name"] == "pocket-looks"
    assert result["metrics"].pop("inception_score")["reason"] == "the extractor classifies nothing"
    assert set(result["metrics"]) == {"clip_score", "frechet", "kid", "cmmd", "paired_distance"}
    for metric in result["metrics"].values():
        assert metric["value"] is not None
    rows = read_rows(scored[1])
    assert rows["key"] == [f"{i}.png" for i in range(COUNT)]
    for name in ("clip_score", "paired_distance"):
        value, (low, high) = (result["metrics"][name][key] for key in ("value", "ci95"))
        assert np.mean(rows[name]) == pytest.approx(value, abs=1e-12) and low <= value <= high


def test_a_teacher_is_at_no_distance_from_itself(
    scored: tuple[Path, Path], captions: Path, real: Path, tmp_path: Path
) -> None:
    model = scored[0].parent / "teacher-model"
    more = ["--real", str(real), "--teacher", str(scored[0])]
    assert run(model, captions, tmp_path / "again", *more) == 0
    metrics = read_results(tmp_path / "again")["metrics"]
    assert metrics["paired_distance"]["value"] == pytest.approx(0, abs=1e-6)
    assert metrics["clip_score"] == read_results(scored[0])["metrics"]["clip_score"]


def test_pictures_are_drawn_once_and_do_not_depend_on_the_batch(
    scored: tuple[Path, Path], captions: Path, real: Path, tmp_path: Path
) -> None:
    model = scored[0].parent / "teacher-model"
    out = tmp_path / "run"
    assert run(model, captions, out, "--real", str(real), "--batch-size", "3") == 0
    for path in sorted((scored[0] / "pictures").glob("*.png")):
        ours = np.asarray(Image.open(out / "pictures" / path.name)).astype(int)
        assert np.abs(ours - np.asarray(Image.open(path)).astype(int)).max() <= 1
    before = (out / "results.json").read_text()
    kept, gone = out / "pictures/000000.png", out / "pictures/000001.png"
    when = kept.stat().st_mtime_ns
    gone.unlink()
    assert run(model, captions, out, "--real", str(real)) == 0
    assert kept.stat().st_mtime_ns == when and gone.exists()
    assert (out / "results.json").read_text() == before


def test_processes_that_start_at_other_times_draw_every_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(pipe: object, shots: list[Shot], batch_size: int) -> list[Image.Image]:
        return [Image.new("RGB", (8, 8)) for _ in shots]

    monkeypatch.setattr(pictures, "draw", fake)
    monkeypatch.setattr(processes, "wait", lambda: None)
    monkeypatch.setattr(processes, "count", lambda: 2)
    for rank in (1, 0):  # the second looks when the first has drawn its share
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        paths = pictures.draw_all(None, [Shot("a dog", i) for i in range(7)], tmp_path, 2)
    assert all(path.exists() for path in paths)


def test_compare_pairs_by_key(
    scored: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(scored[0]), str(scored[0]), "--json"]) == 0
    for name, entry in json.loads(capsys.readouterr().out).items():
        assert entry["difference"] == 0
        if name == "clip_score":
            assert entry["ci95"] == [0.0, 0.0]
        elif entry["ci95"]:
            assert entry["ci95"][0] == -entry["ci95"][1]


def result(folder: Path, scores: list[float], keys: list[str], **protocol: object) -> Path:
    folder.mkdir()
    rows = {"key": keys, "clip_score": scores}
    metrics = {"clip_score": Metric(float(np.mean(scores)), (0.0, 1.0))}
    counts = {"generated": len(keys)}
    write_results(
        folder, "backbone", folder.name, "key", {"n": 3, **protocol}, counts, metrics, rows
    )
    return folder


def test_compare_a_constant_difference_in_another_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = result(tmp_path / "a", [0.1, 0.5, 0.3], ["x", "y", "z"])
    b = result(tmp_path / "b", [0.51, 0.31, 0.11], ["y", "z", "x"])
    assert main(["compare", str(a), str(b), "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)["clip_score"]
    assert entry["difference"] == pytest.approx(0.01)
    assert entry["ci95"] == pytest.approx([0.01, 0.01]) and entry["pairs"] == 3


@pytest.mark.parametrize("what", ["steps", "n"])
def test_unlike_protocols_are_refused(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = result(tmp_path / "a", [0.1], ["x"], **{what: 25})
    b = result(tmp_path / "b", [0.1], ["x"], **{what: 50})
    assert main(["compare", str(a), str(b)]) == 5
    assert f"{what} (25 and 50)" in capsys.readouterr().err


def test_teacher_of_another_protocol_is_refused(
    scored: tuple[Path, Path], captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = scored[0].parent / "teacher-model"
    flags = ["--teacher", str(scored[0]), "--guidance", "3"]
    assert run(model, captions, tmp_path / "run", *flags) == 5
    assert "guidance_scale" in capsys.readouterr().err


def test_published_statistics_of_another_width_are_refused(
    scored: tuple[Path, Path], captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = scored[0].parent / "teacher-model"
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert run(model, captions, tmp_path / "a", "--real", str(tmp_path / "stats.npz")) == 3
    assert "another extractor" in capsys.readouterr().err
    np.savez(tmp_path / "ours.npz", mu=np.zeros(128), sigma=np.eye(128))
    assert run(model, captions, tmp_path / "b", "--real", str(tmp_path / "ours.npz")) == 0
    metrics = read_results(tmp_path / "b")["metrics"]
    assert metrics["frechet"]["value"] > 0
    assert metrics["kid"]["value"] is None and "statistics alone" in metrics["kid"]["reason"]


def test_the_folder_of_another_evaluation_is_refused(
    scored: tuple[Path, Path], captions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = scored[0].parent / "student-model"
    assert run(other, captions, scored[0]) == 2
    assert "another backbone" in capsys.readouterr().err


def test_captions_from_text_files_and_bad_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog\n\na cat\n")
    assert read_captions(tmp_path / "a.txt", 9) == [("000000", "a dog"), ("000002", "a cat")]
    assert read_captions(tmp_path / "a.txt", 1) == [("000000", "a dog")]
    for text, message in (
        ("file_name,words\na,b", "no column 'text'"),
        ("file_name,text\na,b\na,c", "twice"),
        ("file_name,text\n", "no captions"),
    ):
        (tmp_path / "b.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_captions(tmp_path / "b.csv", 9)


def test_large_pictures_are_kept_at_256(tmp_path: Path) -> None:
    for side, kept in ((512, 256), (64, 64)):
        keep(Image.new("RGB", (side, side)), tmp_path / "p.png")
        assert Image.open(tmp_path / "p.png").size == (kept, kept)


def test_an_adapter_is_another_model(
    captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_pipeline(tmp_path / "model")
    photos = image_folder(tmp_path / "photos", count=4)
    (photos / "metadata.csv").unlink()
    words = ["--photos", str(photos), "--class-noun", "dog", "--steps", "1", "--preview-prompts"]
    lora = tmp_path / "lora"
    flags = ["--lora", "--backbone", str(model), "--out", str(lora)]
    assert main(["dreambooth", *words, *flags, "--prior", "none"]) == 0
    assert run(model, captions, tmp_path / "scores") == 0
    assert run(lora, captions, tmp_path / "scores") == 2
    assert "adapter" in capsys.readouterr().err
    assert run(lora, captions, tmp_path / "others") == 0
    assert read_results(tmp_path / "others")["name"] == str(lora)


def test_distances_to_different_teachers_are_not_compared(
    scored: tuple[Path, Path], captions: Path, real: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    models = scored[0].parent
    flags = ["--real", str(real), "--teacher", str(scored[1] / "results.json")]
    assert run(models / "teacher-model", captions, tmp_path / "b", *flags) == 0
    assert main(["compare", str(scored[1]), str(tmp_path / "b")]) == 5
    assert "different models" in capsys.readouterr().err


def bad_real(kind: str, folder: Path) -> Path:
    """A file or folder that ``--real`` must refuse."""
    path = folder / f"{kind}.npz"
    if kind == "cut":
        np.savez(path, mu=np.zeros(128), sigma=np.eye(128))
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "array":
        np.save(path.with_suffix(".npy"), np.zeros(3))
        return path.with_suffix(".npy")
    elif kind == "shapes":
        np.savez(path, mu=np.zeros(128), sigma=np.eye(64))
    elif kind == "nan":
        np.savez(path, mu=np.full(128, np.nan), sigma=np.eye(128))
    else:
        return image_folder(folder / "pictures", broken=(3,))
    return path


@pytest.mark.parametrize("kind", ["cut", "array", "shapes", "nan", "picture"])
def test_a_bad_real_side_is_one_data_error(
    kind: str, scored: tuple[Path, Path], captions: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    real = bad_real(kind, tmp_path)
    model = scored[0].parent / "teacher-model"
    assert run(model, captions, tmp_path / "scores", "--real", str(real)) == 3
    assert str(real) in capsys.readouterr().err
