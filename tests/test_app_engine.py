"""Drawing for the app: the pictures of a fresh pipeline, whatever was drawn before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from bksdm_tune.adapters import read_adapter
from bksdm_tune.app.engine import Cancelled, Engine, Request, settings_of
from bksdm_tune.app.library import Library
from bksdm_tune.cli import main
from bksdm_tune.errors import DataError, UsageError
from bksdm_tune.pipeline import Shot, draw, load_pipeline, save_png
from bksdm_tune.resolve import resolve
from tiny import make_pipeline

FEW = {"steps": 2, "n": 2, "seed": 3}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Two LoRA runs on one backbone, made stronger so that they show, and a full run."""
    folder = tmp_path_factory.mktemp("library")
    backbone = make_pipeline(folder / "backbone", size="small")
    library = Library(folder / "models")
    for name, flags in (("rex", ["--lora"]), ("tom", ["--lora", "--seed", "9"]), ("full", [])):
        words = ["--subject", "dog", "--backbone", str(backbone), "--steps", "2", *flags]
        out = library.root / name
        assert main(["dreambooth", *words, "--preview-prompts", "--out", str(out)]) == 0
        if flags:
            path = out / "pytorch_lora_weights.safetensors"
            tensors, metadata = read_adapter(path)
            save_file({k: 5 * v.contiguous() for k, v in tensors.items()}, path, metadata)
    return library


def arrays(pictures: list[Image.Image]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(picture).astype(int) for picture in pictures])


def fresh(library: Library, name: str) -> np.ndarray[Any, Any]:
    pipe = load_pipeline(resolve(str(library.root / name)), "cpu")
    pipe.unet.to(memory_format=torch.channels_last)  # as the engine has it
    shots = [Shot("a sks11df dog", seed, 2) for seed in (3, 4)]
    return arrays(draw(pipe, shots, 2, 32))


def asked(engine: Engine, **more: Any) -> np.ndarray[Any, Any]:
    request = Request(**({"prompt": "a {subject}"} | FEW | more))
    return arrays(engine.draw(request, lambda share: None).pictures)


def test_swapped_adapters_draw_as_fresh_ones(library: Library) -> None:
    """rex, tom, the full run, rex again: what a fresh pipeline draws; the backbone loaded once."""
    engine = Engine(library, "cpu")
    for name in ("rex", "tom", "full", "rex"):
        assert (asked(engine, model=name) == fresh(library, name)).all(), name
    assert len(engine.pipes) == 2  # the backbone and the full run
    assert (fresh(library, "rex") != fresh(library, "tom")).any()


def test_strength(library: Library) -> None:
    """0 is the backbone, 1 the adapter as it is."""
    engine = Engine(library, "cpu")
    parts = resolve(str(library.root / "rex"))
    plain = asked(engine, prompt="a sks11df dog", backbone=parts.ref)
    assert (asked(engine, model="rex", strength=0.0) == plain).all()
    assert (asked(engine, model="rex") == fresh(library, "rex")).all()
    assert (asked(engine, prompt="a sks11df dog", backbone=parts.ref) == plain).all()


def test_progress_and_cancel(library: Library) -> None:
    engine, seen = Engine(library, "cpu"), list[float]()
    engine.draw(Request("x", model="rex", steps=4), seen.append)
    assert seen[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0]) and seen[-1] == 1

    def stop(share: float) -> None:
        if share > 0.4:
            raise Cancelled

    with pytest.raises(Cancelled):
        engine.draw(Request("x", model="rex", steps=4), stop)
    assert (asked(engine, model="rex") == fresh(library, "rex")).all()  # nothing is stuck


@pytest.mark.parametrize(
    "wrong",
    [{"prompt": ""}, {"prompt": "x" * 3000}, {"prompt": "a\0b"}, {"n": 0}, {"n": 999},
     {"seed": -1}, {"seed": 2**70}, {"steps": 0}, {"steps": 10**9}, {"guidance": float("nan")},
     {"guidance": -1.0}, {"strength": float("inf")}, {"model": "../x"}, {"model": None}],
)  # fmt: skip
def test_wrong_requests_are_refused(library: Library, wrong: dict[str, Any]) -> None:
    engine = Engine(library, "cpu")
    with pytest.raises(UsageError):
        engine.draw(Request(**({"prompt": "a dog", "model": "rex"} | wrong)), lambda share: None)


def test_a_full_run_that_took_the_place_of_another(library: Library) -> None:
    """The new weights draw, not the old ones that are still in memory."""
    engine, place = Engine(library, "cpu"), library.root / "place"
    shutil.copytree(library.root / "full", place)
    before = asked(engine, model="place")
    library.delete("place")
    shutil.copytree(library.root / "full", place)
    path = place / "unet/diffusion_pytorch_model.safetensors"
    save_file({k: 1.5 * v for k, v in load_file(path).items()}, path)
    (place / "model_index.json").touch()
    after = asked(engine, model="place")
    library.delete("place")
    assert (after != before).any()


def test_an_accelerators_memory_is_given_back(library: Library) -> None:
    """Not while somebody draws; the next drawing loads again."""
    engine = Engine(library, "cpu")
    before = asked(engine, model="rex")
    engine.release()
    assert engine.pipes  # main memory is left alone
    engine.device = "cuda"
    with engine.lock:
        engine.release()
    assert engine.pipes
    engine.release()
    assert not engine.pipes and not engine.worn
    engine.device = "cpu"
    assert (asked(engine, model="rex") == before).all()


def test_a_model_that_was_deleted(library: Library) -> None:
    engine = Engine(library, "cpu")
    shutil.copytree(library.root / "rex", library.root / "gone")
    asked(engine, model="gone")
    library.delete("gone")
    with pytest.raises(UsageError, match="no such model"):
        asked(engine, model="gone")


def test_settings_come_back_from_a_png(tmp_path: Path) -> None:
    shot = Shot("a red dog", 7, 30, 5.0, "blurry")
    save_png(tmp_path / "a.png", Image.new("RGB", (8, 8)), shot, model="rex", strength="0.5")
    wanted = Request("a red dog", "rex", None, "blurry", 1, 7, 30, 5.0, 0.5)
    assert settings_of(tmp_path / "a.png") == wanted
    hostile = PngInfo()
    hostile.add_text("bksdm_tune", json.dumps({"prompt": 5, "seed": "x"}))
    Image.new("RGB", (8, 8)).save(tmp_path / "e.png", pnginfo=hostile)
    with pytest.raises(UsageError, match="is not right"):
        settings_of(tmp_path / "e.png")
    deep = PngInfo()
    deep.add_text("bksdm_tune", "[" * 100_000)
    Image.new("RGB", (8, 8)).save(tmp_path / "f.png", pnginfo=deep)
    with pytest.raises(DataError):
        settings_of(tmp_path / "f.png")
    plain = PngInfo()
    plain.add_text("bksdm_tune", "[1")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png", pnginfo=plain)
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    (tmp_path / "d.png").write_text("<svg/>")
    for name in ("b.png", "c.png", "d.png"):
        with pytest.raises(DataError):
            settings_of(tmp_path / name)
