"""A ported adapter after healing does more as the original does on the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bksdm_tune.adapters import read_adapter
from bksdm_tune.cli import main
from bksdm_tune.files import answers, heal
from bksdm_tune.lora import fit
from bksdm_tune.pipeline import load_pipeline
from bksdm_tune.resolve import resolve
from tiny import make_pipeline, unet_config


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A tiny teacher and a student of it that has drifted, registered as a family of their own, and
    a LoRA run on the teacher whose effect is large."""
    teacher = make_pipeline(tmp_path / "teacher")
    assert main(["build", "--size", "small", "--teacher", str(teacher), "--out",
                 str(tmp_path / "student")]) == 0  # fmt: skip
    weights = tmp_path / "student/unet/diffusion_pytorch_model.safetensors"
    torch.manual_seed(0)
    save_file({k: v + 0.05 * v.std() * torch.randn_like(v) if v.numel() > 1 else v
               for k, v in load_file(weights).items()}, weights)  # fmt: skip
    names = {"tiny-teacher": ("tiny", "teacher"), "tiny-small": ("tiny", "small")}
    monkeypatch.setattr(fit, "ARCHITECTURES", names)
    monkeypatch.setitem(fit.TEACHER_UNETS, "tiny", unet_config())
    from bksdm_tune.files import port, port_command

    monkeypatch.setattr(port, "ARCHITECTURES", names)
    monkeypatch.setitem(port.TEACHER_UNETS, "tiny", unet_config())
    assert port_command.known("tiny-small", "--to") == "tiny-small"
    words = ["--subject", "dog", "--lora", "--backbone", str(teacher), "--steps", "2"]
    assert main(["dreambooth", *words, "--preview-prompts", "--out", str(tmp_path / "run")]) == 0
    path = tmp_path / "run/pytorch_lora_weights.safetensors"
    tensors, metadata = read_adapter(path)
    save_file(
        {k: 5 * v.contiguous() for k, v in tensors.items()}, tmp_path / "a.safetensors", metadata
    )
    return {"folder": tmp_path, "teacher": teacher, "student": tmp_path / "student"}


def distance(family: dict[str, Any], adapter: Path) -> float:
    from dataclasses import replace

    given = replace(resolve(str(family["teacher"])), adapter=family["folder"] / "a.safetensors")
    healed = replace(resolve(str(family["student"])), adapter=adapter)
    pipes = [load_pipeline(parts, "cpu") for parts in (given, healed)]
    said = [answers.ask(p.unet, p.text_encoder, p.tokenizer) for p in pipes]
    return float((said[0]["U-Net"] - said[1]["U-Net"]).square().mean())


def test_healing_brings_it_nearer(
    family: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = family["folder"]
    monkeypatch.setattr(heal, "Shot", lambda prompt, seed: heal_shot(prompt, seed))
    words = ["port", str(folder / "a.safetensors"), "--from", "tiny-teacher", "--to", "tiny-small"]
    raw, mended = folder / "raw.safetensors", folder / "mended.safetensors"
    assert main([*words, "--out", str(raw)]) == 0
    refs = ["--teacher", str(family["teacher"]), "--student", str(family["student"])]
    assert main([*words, "--out", str(mended), "--heal", "--heal-steps", "60", *refs]) == 0
    assert "Healed" in capsys.readouterr().out
    assert distance(family, mended) < 0.92 * distance(family, raw)
    a, b = load_file(raw), load_file(mended)
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]) == key.startswith("text_encoder"), key
    assert not (folder / "mended.healing").exists()


def heal_shot(prompt: str, seed: int) -> Any:
    from bksdm_tune.pipeline import Shot

    return Shot(prompt, seed, steps=2)


def test_healing_needs_the_words(family: dict[str, Any], capsys: Any) -> None:
    folder = family["folder"]
    save_file(load_file(folder / "a.safetensors"), folder / "b.safetensors")
    words = ["port", str(folder / "b.safetensors"), "--from", "tiny-teacher", "--to", "tiny-small"]
    assert main([*words, "--out", str(folder / "c.safetensors"), "--heal"]) == 2
    assert "--subject" in capsys.readouterr().err
