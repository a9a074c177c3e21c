"""Scores of subjects: equal to a naive scorer, and every fault of a manifest is one clear line."""

from __future__ import annotations

import csv
import json
import random
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow.parquet
import pytest
from safetensors.torch import load_file, save_file

import scoring
from bksdm_tune.cli import main
from bksdm_tune.errors import DataError
from bksdm_tune.evaluate import subject_scores
from bksdm_tune.evaluate.compare import compare
from bksdm_tune.evaluate.protocols import load_judges
from bksdm_tune.evaluate.results import fingerprint
from bksdm_tune.evaluate.score import score
from bksdm_tune.evaluate.subject_scores import unit

METRICS = ("dino", "clip_i", "clip_t", "pres")


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return scoring.make_judges(tmp_path_factory.mktemp("judges"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, judges: Any) -> dict[str, Any]:
    """A manifest scored through the command line, and what the naive scorer finds."""
    folder = tmp_path_factory.mktemp("world")
    rows = scoring.make_rows(folder)
    out = folder / "out"
    assert main(command(scoring.write(folder, rows), judges, out)) == 0
    naive = scoring.Naive(*judges).scores(folder, rows)
    result = json.loads((out / "scores.json").read_text())
    return {"folder": folder, "rows": rows, "out": out, "naive": naive, "result": result}


def command(manifest: Path, judges: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    encoders = ["--dino", str(judges[0]), "--clip", str(judges[1])]
    return ["score", "--manifest", str(manifest), "--out", str(out), *encoders, *more]


def table(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(out / "images.parquet").to_pylist()
    return rows


@pytest.fixture
def copy(tmp_path: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Pictures of one's own to spoil."""
    return tmp_path, scoring.make_rows(tmp_path, photos=2, samples=1, prior=0)


def test_every_picture_agrees_with_the_naive_scorer(world: dict[str, Any]) -> None:
    found = {row["path"]: row for row in table(world["out"])}
    assert len(world["naive"]) == 28  # 10 cells x 2 and 4 subjects x 2 of the class
    for path, figures in world["naive"].items():
        for name, value in figures.items():
            assert found[path][name] == pytest.approx(value, abs=1e-4), (path, name)


@pytest.mark.parametrize("name", METRICS)
def test_means_agree_with_the_naive_scorer(world: dict[str, Any], name: str) -> None:
    value = world["result"]["metrics"][name]["macro"]
    assert value == pytest.approx(scoring.macro(world["rows"], world["naive"], name), abs=5e-5)


@pytest.mark.parametrize(
    ("fault", "name"),
    [("order", "dino"), ("no crop", "dino"), ("mean and std", "dino"), ("substring", "dino"),
     ("mean patch", "dino"), ("identifier", "clip_t")],
)  # fmt: skip
def test_the_agreement_shows_faults(
    world: dict[str, Any], judges: tuple[Path, Path], fault: str, name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The naive scorer with one fault no longer agrees, so the tests above could have failed."""
    rows, folder = [dict(row) for row in world["rows"]], world["folder"]
    naive = scoring.Naive(*judges)
    if fault == "no crop":
        sizes = scoring.transforms.Resize((224, 224))
        monkeypatch.setattr(scoring.transforms, "CenterCrop", lambda side: sizes)
    elif fault == "mean and std":
        monkeypatch.setattr(scoring, "IMAGENET", ((0.5,) * 3, (0.5,) * 3))
    elif fault == "mean patch":
        vit = naive.vit

        class Mean:
            def __call__(self, pixel_values: Any) -> Any:
                tokens = vit(pixel_values=pixel_values).last_hidden_state
                tokens = tokens[:, 1:].mean(1, keepdim=True)
                return type("Output", (), {"last_hidden_state": tokens})

        naive.vit = Mean()
    elif fault == "substring":
        for row in rows:
            if row["role"] == "reference" and "backpack" in row["subject_id"]:
                rows = [*rows, row | {"subject_id": "backpack", "path": row["path"]}]
    elif fault == "identifier":
        for row in rows:
            if row["role"] == "generated":
                row["prompt_template"] = row["prompt_template"].replace("{0} ", "sks ")
    found = naive.scores(folder, rows)
    value = scoring.macro(rows, found, name)
    if fault == "order":
        value = float(np.mean([figures[name] for figures in found.values() if name in figures]))
    assert abs(value - world["result"]["metrics"][name]["macro"]) > 5e-4


def test_batch_size_does_not_matter(world: dict[str, Any], judges: Any, tmp_path: Path) -> None:
    manifest = world["folder"] / "manifest.jsonl"
    assert main(command(manifest, judges, tmp_path, "--batch-size", "1")) == 0
    for one, other in zip(table(tmp_path), table(world["out"]), strict=True):
        for name in METRICS:
            if one[name] is not None:
                assert one[name] == pytest.approx(other[name], abs=1e-5)


def test_the_order_of_the_lines_changes_no_byte(world: dict[str, Any], judges: Any) -> None:
    rows = list(world["rows"])
    random.Random(0).shuffle(rows)
    manifest = world["folder"] / "shuffled.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = world["folder"] / "other"
    assert main(command(manifest, judges, out)) == 0
    for name in ("scores.json", "images.csv", "report.html"):
        assert (out / name).read_bytes() == (world["out"] / name).read_bytes()


def test_the_result_follows_its_schema(world: dict[str, Any]) -> None:
    schema = resources.files("bksdm_tune.evaluate").joinpath("scores.schema.json").read_text()
    jsonschema.validate(world["result"], json.loads(schema))
    assert world["result"]["protocol"]["name"] == "custom"
    assert world["result"]["metrics"]["div"]["reason"].startswith("LPIPS's weights")
    assert len(world["result"]["per_subject"]) == 4 and len(world["result"]["per_prompt"]) == 5


def test_every_summary_follows_from_the_tables(world: dict[str, Any]) -> None:
    rows = table(world["out"])
    with open(world["out"] / "images.csv", newline="") as file:
        texts = list(csv.DictReader(file))
    assert len(texts) == len(rows) == 42
    for name in METRICS:
        again = subject_scores.summary(rows, name, None)
        written = world["result"]["metrics"][name]
        for key in ("macro", "image_mean", "pair_micro"):
            assert again[key] == pytest.approx(written[key], abs=1e-12)
        assert again["ci95"] == pytest.approx(written["ci95"], abs=1e-12)
        assert again["ceiling"] == written["ceiling"]
        column = [float(row[name]) for row in texts if row["role"] != "reference" and row[name]]
        assert np.mean(column) == pytest.approx(written["image_mean"], abs=1e-12)


def test_ceiling_with_and_without_self_pairs(world: dict[str, Any], judges: Any) -> None:
    naive, without, within = scoring.Naive(*judges), [], []
    for name in scoring.SUBJECTS:
        rows = [r for r in world["rows"] if r["role"] == "reference" and r["subject_id"] == name]
        features = [naive.dino(world["folder"] / row["path"]) for row in rows]
        pairs = [
            float(a @ b) for i, a in enumerate(features) for j, b in enumerate(features) if i != j
        ]
        without.append(np.mean(pairs))
        within.append((sum(pairs) + len(features)) / len(features) ** 2)
    found = world["result"]["metrics"]["dino"]["ceiling"]
    assert found["without_self"] == pytest.approx(np.mean(without), abs=5e-5)
    assert found["with_self"] == pytest.approx(np.mean(within), abs=5e-5)


def test_the_report_opens_offline(world: dict[str, Any]) -> None:
    text = (world["out"] / "report.html").read_text()
    assert "<svg" in text and "backpack_dog" in text and "data:image/webp" in text
    for word in ('src="http', 'href="http', "<script", "@import"):
        assert word not in text


FAULTS: dict[str, tuple[Any, str]] = {
    "truncated": (lambda f, rows: cut(f / rows[0]["path"]), "photo0.png is damaged or truncated"),
    "duplicate": (lambda f, rows: rows.append(dict(rows[3])), "the same generated as line 4"),
    "unknown field": (lambda f, rows: rows[3].update(colour="red"), "line 4: a generated row has"),
    "lacking field": (lambda f, rows: rows[3].pop("seed"), "line 4: a generated row needs seed"),
    "wrong type": (lambda f, rows: rows[3].update(seed="1"), "line 4: seed is '1'"),
    "outside": (lambda f, rows: rows[3].update(path="../x.png"), "line 4: ../x.png leads out"),
    "absolute": (lambda f, rows: rows[3].update(path="/x.png"), "line 4: /x.png leads out"),
    "no photos": (lambda f, rows: rows.__delitem__(slice(0, 2)), "subject dog has no reference"),
    "role": (lambda f, rows: rows[3].update(role="fake"), "line 4: role is 'fake', not one of"),
    "group": (lambda f, rows: rows[3].update(group="toy"), "line 4: group is 'toy'"),
    "long name": (lambda f, rows: rows[0].update(path="x" * 300), "line 1: xxx"),
    "template": (lambda f, rows: rows[3].update(prompt_template="a dog"), "class noun, {1}"),
}  # fmt: skip


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_line_each(
    copy: Any, judges: Any, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, rows = copy
    spoil, message = FAULTS[fault]
    spoil(folder, rows)
    out = folder / "out"
    assert main(command(scoring.write(folder, rows), judges, out)) == 3
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert [path.name for path in out.iterdir()] == ["errors.txt"]
    assert message in (out / "errors.txt").read_text()


@pytest.mark.parametrize("line", ["{half", "[" * 100_000, '{"seed": ' + "1" * 5000 + "}"])
def test_a_line_that_is_no_json(copy: Any, judges: Any, line: str, capsys: Any) -> None:
    folder, rows = copy
    manifest = scoring.write(folder, rows)
    manifest.write_text(f"{manifest.read_text()}{line}\n")
    assert main(command(manifest, judges, folder / "out")) == 3
    assert f"line {len(rows) + 1}: " in capsys.readouterr().err


@pytest.mark.parametrize("how", ["no row", "no file", "truncated"])
def test_missing_pictures(copy: Any, judges: Any, how: str, capsys: Any) -> None:
    """dog has three prompts, so one of ten cells is missing."""
    folder, rows = copy
    if how == "no row":
        lost = rows.pop(3)
    else:
        lost = rows[3]
        path = folder / lost["path"]
        path.unlink() if how == "no file" else cut(path)
    manifest, out = scoring.write(folder, rows), folder / "out"
    assert main(command(manifest, judges, out)) == 3
    assert "--on-missing partial" in capsys.readouterr().err
    assert main(command(manifest, judges, out, "--on-missing", "partial")) == 4
    result = json.loads((out / "scores.json").read_text())
    assert not result["complete"] and len(result["exclusions"]) >= 1
    assert result["counts"]["generated"] == 9
    told = str(result["exclusions"])
    assert "subject dog: 0 of 1 pictures of prompt p1" in told or lost["path"] in told


def test_holes_have_the_subjects_line(copy: Any, judges: Any, capsys: Any) -> None:
    folder, rows = copy
    lost, drawn = rows.pop(3), next(row for row in rows if row["role"] == "generated")
    assert lost["subject_id"] == drawn["subject_id"] == "dog"
    facts = {name: drawn[name] for name in ("subject_id", "path", "class_noun", "seed")}
    rows.append({"role": "class_prior"} | facts)
    places = {row["subject_id"]: len(rows) - n for n, row in enumerate(reversed(rows))}
    other = next(name for name in places if name != "dog")
    assert main(command(scoring.write(folder, rows), judges, folder / "out")) == 3
    said = capsys.readouterr().err
    assert "line 1: subject dog: 0 of 1 pictures of prompt p1" in said
    assert f"line {places[other]}: subject {other}: 0 of 1 pictures of the class" in said


def test_black_and_copied_pictures_are_flagged(copy: Any, judges: Any) -> None:
    folder, rows = copy
    black, copied = folder / rows[2]["path"], folder / rows[3]["path"]
    scoring.Image.new("RGB", (64, 64), (3, 2, 0)).save(black)
    copied.write_bytes((folder / rows[0]["path"]).read_bytes())
    score(
        scoring.write(folder, rows), load_judges(None, *map(str, judges), "cpu"), folder / "o", "x"
    )
    found = {row["path"]: row for row in table(folder / "o")}
    assert [p for p, row in found.items() if row["black"]] == [rows[2]["path"]]
    assert found[rows[3]["path"]]["copied"] and found[rows[3]["path"]]["nearest"] > 0.9999


def test_one_subject_has_no_interval(copy: Any, judges: Any) -> None:
    folder, rows = copy
    mine = [row for row in rows if row["subject_id"] == "dog"]
    assert main(command(scoring.write(folder, mine), judges, folder / "out")) == 0
    metric = json.loads((folder / "out/scores.json").read_text())["metrics"]["dino"]
    assert metric["ci95"] is None and metric["ci95_reason"] == "only one subject"


def test_a_floor_normalises(world: dict[str, Any], judges: Any, tmp_path: Path) -> None:
    """Against its own scores as the floor everything is 0; against less it lies between."""
    manifest = world["folder"] / "manifest.jsonl"
    assert main(command(manifest, judges, tmp_path, "--floor", str(world["out"]))) == 0
    metric = json.loads((tmp_path / "scores.json").read_text())["metrics"]["dino"]
    assert metric["normalised"] == 0 and metric["floor"] == metric["macro"]


def test_what_to_score_is_said_once(capsys: Any) -> None:
    for words in (["score"], ["score", "x", "--manifest", "y"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2 and "Say what to score" in capsys.readouterr().err


def test_a_manifest_that_is_not_there(tmp_path: Path, capsys: Any) -> None:
    assert main(["score", "--manifest", "nowhere.jsonl", "--out", str(tmp_path)]) == 3
    assert "nowhere.jsonl is not there" in capsys.readouterr().err


def test_paths_and_numbers_of_other_tools(copy: Any, judges: Any) -> None:
    """./a//b.png is a/b.png, seeds have 64 bits, prompt ids may be numbers."""
    folder, rows = copy
    rows = [row for row in rows if row["subject_id"] == "dog"]
    rows[0]["path"] = f"./{rows[0]['path']}"
    rows[2] |= {"path": rows[2]["path"].replace("/", "//"), "seed": 2**64 - 1, "prompt_id": 7}
    assert main(command(scoring.write(folder, rows), judges, folder / "out")) == 0
    found = next(row for row in table(folder / "out") if row["prompt_id"] == "7")
    assert found["seed"] == 2**64 - 1 and found["path"] == "dog/0-0.png"


@pytest.mark.parametrize(
    "change",
    [{"role": ["x"]}, {"prompt_template": "a {0.x} {1}"}, {"path": "a\0.png"}, {"seed": -1},
     {"seed": 2**64}, {"subject_id": "\ud800"}],
)  # fmt: skip
def test_odd_values_are_one_line(copy: Any, judges: Any, change: Any, capsys: Any) -> None:
    folder, rows = copy
    rows[2] |= change
    assert main(command(scoring.write(folder, rows), judges, folder / "out")) == 3
    assert "line 3: " in capsys.readouterr().err


def test_exclusions_do_not_depend_on_the_order(copy: Any, judges: Any) -> None:
    folder, rows = copy
    (folder / rows[2]["path"]).unlink()
    texts = []
    for order in (rows, rows[::-1]):
        out = folder / f"out{len(texts)}"
        words = command(scoring.write(folder, order), judges, out, "--on-missing", "partial")
        assert main(words) == 4
        texts.append((out / "scores.json").read_bytes())
    assert texts[0] == texts[1] and str(folder).encode() not in texts[0]


@pytest.mark.parametrize("flag", ["--dino", "--clip"])
def test_encoders_without_all_their_weights_are_refused(
    copy: Any, judges: Any, tmp_path: Path, flag: str, capsys: Any
) -> None:
    folder, rows = copy
    broken = tmp_path / "broken"
    shutil.copytree(judges[flag == "--clip"], broken)
    tensors = load_file(broken / "model.safetensors")
    tensors.pop(
        next(name for name in tensors if "layer_norm2.weight" in name or "layernorm_after" in name)
    )
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    words = command(scoring.write(folder, rows), judges, folder / "out")
    words[words.index(flag) + 1] = str(broken)
    assert main(words) == 3
    assert "weights lack" in capsys.readouterr().err


def test_a_clip_is_no_dino(copy: Any, judges: Any, capsys: Any) -> None:
    folder, rows = copy
    words = command(scoring.write(folder, rows), (judges[1], judges[1]), folder / "out")
    assert main(words) == 3
    assert "cannot be loaded as a vision model" in capsys.readouterr().err


def test_features_that_are_no_numbers_are_told() -> None:
    for bad in (np.zeros((2, 3)), np.full((2, 3), np.nan)):
        with pytest.raises(DataError, match="not finite, or with zeros"):
            unit(bad)


def test_what_both_have_is_compared(
    world: dict[str, Any], judges: Any, copy: Any, capsys: Any
) -> None:
    """A complete result against one that lost a picture: means over what both have."""
    folder, rows = copy
    manifest, lost = scoring.write(folder, rows), rows[3]
    assert main(command(manifest, judges, folder / "a")) == 0
    (folder / lost["path"]).unlink()
    assert main(command(manifest, judges, folder / "b", "--on-missing", "partial")) == 4
    report = compare(folder / "a", folder / "b")
    for entry in report.values():
        assert entry["a"] == entry["b"] and entry["difference"] == 0
    assert report["dino"]["pairs"] == report["dino"]["of"] - 1
    capsys.readouterr()
    assert main(["compare", str(folder / "a"), str(folder / "b")]) == 0
    said = capsys.readouterr().out
    assert "Protocol custom." in said and "dino: 9 of 10 pictures are in both." in said


def test_lpips_makes_no_other_protocol() -> None:
    facts = {"name": "dreambooth", "dino": "a"}
    assert fingerprint(facts | {"lpips": None}) == fingerprint(facts | {"lpips": "b"})
    assert fingerprint(facts) != fingerprint(facts | {"dino": "b"})


def test_half_precision_folders_are_used_in_single(judges: Any, tmp_path: Path) -> None:
    """transformers 5 loads what the file says; the protocol says float32."""
    model = scoring.ViTModel.from_pretrained(judges[0])
    model.half().save_pretrained(tmp_path / "half")
    from bksdm_tune.evaluate.encoders import dino

    encoder = dino(str(tmp_path / "half"), "cpu")
    features = encoder.images(scoring.torch.zeros(1, 224, 224, 3, dtype=scoring.torch.uint8))
    assert features.dtype == scoring.torch.float32


def test_custom_is_a_protocols_name(judges: Any, copy: Any, capsys: Any) -> None:
    folder, rows = copy
    manifest = scoring.write(folder, rows)
    assert main(command(manifest, judges, folder / "out", "--protocol", "custom")) == 0
    with pytest.raises(SystemExit) as ended:
        main(command(manifest, judges, folder / "out", "--protocol", "bksdm"))
    assert ended.value.code == 2


def test_a_failed_call_does_not_block_the_next(copy: Any, judges: Any) -> None:
    folder, rows = copy
    lost = rows.pop(3)
    assert main(command(scoring.write(folder, rows), judges, folder / "out")) == 3
    assert main(command(scoring.write(folder, [*rows, lost]), judges, folder / "out")) == 0
    assert not (folder / "out/errors.txt").exists()
