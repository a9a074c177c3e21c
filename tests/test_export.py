"""Every exported file, loaded by a reader that did not write it, is the model that was exported."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bksdm_tune.cli import main
from bksdm_tune.files import export as exports
from bksdm_tune.files import ldm
from bksdm_tune.files.answers import question
from bksdm_tune.generate import Config, find_model
from bksdm_tune.lora import layouts
from bksdm_tune.lora.fit import config_of
from bksdm_tune.pipeline import load_pipeline
from bksdm_tune.pocket import materialise
from tiny import make_pipeline

ADAPTER_FORMATS = ("diffusers", "peft", "kohya", "merged", "single-file")
KINDS = list(itertools.product(("teacher", "base", "small", "tiny"), (False, True), (False, True)))
"""Size, v2, text encoder trained."""
ENDS = ("to_q", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "conv_shortcut", "time_emb_proj",
        "downsamplers.0.conv")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """LoRA runs of alpha 3 at rank 2 (text encoder 5 at 2), made once each; full runs."""
    made: dict[tuple[Any, ...], Path] = {}

    def run(size: str, v2: bool, text: bool, full: bool = False) -> Path:
        key = (size, v2, text, full)
        if key not in made:
            folder = tmp_path_factory.mktemp("run")
            backbone = make_pipeline(folder / "backbone", size=size, v2=v2)
            lora = ["--lora", "--rank", "2", "--alpha", "3", "--text-encoder-rank", "2",
                    "--text-encoder-alpha", "5"]  # fmt: skip
            words = ["--subject", "dog", "--backbone", str(backbone), "--steps", "3"]
            words += ["--train-text-encoder", str(text).lower(), "--learning-rate", "0.05"]
            words += ["--preview-prompts", "--prior", "none", "--out", str(folder / "run")]
            assert main(["dreambooth", *words, *([] if full else lora)]) == 0
            made[key] = folder / "run"
        return made[key]

    return run


def target(folder: Path, name: str) -> Path:
    return folder / (name if name in ("peft", "merged") else f"{name}.safetensors")


@pytest.mark.parametrize("name", ADAPTER_FORMATS)
def test_a_lora_run_in_every_format(runs: Any, tmp_path: Path, name: str, capsys: Any) -> None:
    """The command compares to 1e-5 of the largest answer itself; here once more by hand."""
    run, out = runs("base", False, True), target(tmp_path, name)
    assert main(["export", str(run), "--format", name, "--out", str(out), "--dtype", "fp32"]) == 0
    assert "U-Net: " in capsys.readouterr().out
    made_on = Path(json.loads((run / "manifest.json").read_text())["parents"]["backbone"]["ref"])
    ours = loaded(made_on, run / "pytorch_lora_weights.safetensors")
    plain = predicted(StableDiffusionPipeline.from_pretrained(made_on, safety_checker=None))
    if name in ("diffusers", "kohya"):
        theirs = loaded(made_on, out)
    elif name == "merged":
        theirs = predicted(StableDiffusionPipeline.from_pretrained(out, safety_checker=None))
    else:
        return  # read by PEFT and by diffusers' converter in the command
    assert float((ours - theirs).abs().max()) < 1e-5
    assert float((ours - plain).abs().max()) > 1e-3  # the adapter does something


@pytest.mark.parametrize(("size", "v2", "text"), KINDS)
def test_every_format_of_a_file_of_another_tool(
    tmp_path: Path, size: str, v2: bool, text: bool
) -> None:
    """Kohya's keys, linear layers and convolutions, two ranks, two alphas unlike them; diffusers,
    PEFT and this program's own reader see what the formula says."""
    base = make_pipeline(tmp_path / "base", size=size, v2=v2)
    wanted, path = written_by_hand(base, text, tmp_path)
    plain = predicted(StableDiffusionPipeline.from_pretrained(base, safety_checker=None))
    assert float((wanted - plain).abs().max()) > 1e-2
    for name in ADAPTER_FORMATS:
        out = target(tmp_path, name)
        words = ["--format", name, "--out", str(out), "--dtype", "fp32"]
        assert main(["export", str(path), "--backbone", str(base), *words]) == 0
        if name in ("diffusers", "kohya"):
            theirs = loaded(base, out)
        elif name == "merged":
            theirs = predicted(StableDiffusionPipeline.from_pretrained(out, safety_checker=None))
        elif name == "peft":  # a folder for each part
            found = find_model(Config(str(out), "", backbone=str(base)))
            theirs = predicted(load_pipeline(found.parts, "cpu"))
        else:
            continue  # read by diffusers' converters in the command
        scale = float(wanted.abs().max())
        assert float((wanted - theirs).abs().max()) < 1e-5 * max(1, scale), name
        if name != "merged":
            assert layouts.read(out).trigger == "zwx cat"
            made_from = layouts.read(out).made_from
            assert made_from is not None and made_from.backbone == "base"  # not where it lies


def written_by_hand(base: Path, text: bool, folder: Path) -> tuple[torch.Tensor, Path]:
    """What the backbone says with updates added to its weights, and the file that holds them."""
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    modules = {f"lora_unet_{p}": m for p, m in pipe.unet.named_modules() if p.endswith(ENDS)}
    if text:
        level = "" if hasattr(pipe.text_encoder, "text_model") else "text_model."
        named = pipe.text_encoder.named_modules()
        modules |= {
            f"lora_te_{level}{p}": m for p, m in named if p.endswith(("q_proj", "out_proj", "fc1"))
        }
    torch.manual_seed(0)
    tensors = {}
    for number, (path, module) in enumerate(modules.items()):
        out, inner, *kernel = module.weight.shape
        ones = [1] * len(kernel)
        rank = 4 if kernel else 2
        down, up = 0.2 * torch.randn(rank, inner, *kernel), 0.2 * torch.randn(out, rank, *ones)
        alpha, name = (3.0, 5.0, 3.0)[number % 3], path.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
        change = (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)
        module.weight.data += alpha / rank * change
    path = folder / "foreign.safetensors"
    save_file(tensors, path, {"modelspec.trigger_phrase": "zwx cat"})
    return predicted(pipe), path


def loaded(backbone: Path, adapter: Path) -> torch.Tensor:
    pipe = StableDiffusionPipeline.from_pretrained(backbone, safety_checker=None)
    pipe.load_lora_weights(adapter.parent, weight_name=adapter.name)
    return predicted(pipe)


@torch.inference_mode()
def predicted(pipe: Any) -> torch.Tensor:
    ids = pipe.tokenizer(["sks11df dog"] * 2, padding="max_length", return_tensors="pt").input_ids
    noisy, timesteps = question(pipe.unet.config)
    said: torch.Tensor = pipe.unet(noisy, timesteps, pipe.text_encoder(ids)[0]).sample
    return said


@pytest.mark.parametrize(("size", "v2", "text"), [("base", False, True), ("small", True, False)])
def test_onnx_answers_the_same(
    runs: Any, tmp_path: Path, size: str, v2: bool, text: bool, capsys: Any
) -> None:
    """To 1e-4 in the command; here at another batch size, which the graph must allow."""
    import onnxruntime

    run, out = runs(size, v2, text), tmp_path / "onnx"
    assert main(["export", str(run), "--format", "onnx", "--out", str(out)]) == 0
    assert "VAE encoder: " in capsys.readouterr().out
    session = onnxruntime.InferenceSession(out / "unet/model.onnx")
    feed = {"sample": torch.randn(3, 4, 8, 8).numpy(), "timestep": torch.tensor([1, 2, 3]).numpy(),
            "encoder_hidden_states": torch.randn(3, 77, 16).numpy()}  # fmt: skip
    (said,) = session.run(["out_sample"], feed)
    assert said.shape == (3, 4, 8, 8)
    names = {"unet", "text_encoder", "vae_decoder", "vae_encoder", "tokenizer", "scheduler"}
    assert names <= {path.name for path in out.iterdir()}


def test_text_encoders_have_the_names_of_published_ones(runs: Any, tmp_path: Path) -> None:
    """transformers 4 finds nothing without the level ``text_model.``, and draws with random
    weights; this release reads both."""
    full = runs("tiny", False, True, True)
    out = tmp_path / "merged"
    words = ["export", str(runs("base", False, True)), "--format", "merged", "--out", str(out)]
    assert main(words) == 0
    pocket = materialise("pocket-tiny")
    for folder in (full, out, pocket):
        assert all(
            key.startswith("text_model.")
            for key in load_file(folder / "text_encoder/model.safetensors")
        )


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_says_how_far_it_is(
    runs: Any, tmp_path: Path, dtype: str, capsys: Any
) -> None:
    out = tmp_path / "merged"
    words = ["export", str(runs("base", False, True)), "--format", "merged", "--dtype", dtype]
    assert main([*words, "--out", str(out)]) == 0
    assert "of the largest answer" in capsys.readouterr().out
    tensors = load_file(out / "unet/diffusion_pytorch_model.safetensors")
    assert {str(t.dtype)[6:] for t in tensors.values()} == {
        {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    }


def test_kohyas_metadata(runs: Any, tmp_path: Path) -> None:
    out = tmp_path / "k.safetensors"
    run = runs("base", False, True)
    assert main(["export", str(run), "--format", "kohya", "--out", str(out)]) == 0
    with safe_open(out, "pt") as file:
        said, keys = file.metadata(), list(file.keys())
    assert said["ss_network_dim"] == "2" and said["modelspec.trigger_phrase"] == "sks11df dog"
    assert all(key.startswith(("lora_unet_", "lora_te_text_model_encoder_layers_")) for key in keys)
    assert any("mlp_fc1" in key for key in keys) and any("ff_net_0_proj" in key for key in keys)


def test_a_full_run_as_one_file_and_as_a_lora(runs: Any, tmp_path: Path, capsys: Any) -> None:
    """At full rank the LoRA is the change of the matrices; at rank 1 less of it."""
    run, shares = runs("tiny", False, False, True), []
    for rank in (64, 1):
        out = tmp_path / f"{rank}.safetensors"
        words = ["export", str(run), "--format", "svd", "--rank", str(rank), "--out", str(out)]
        assert main(words) == 0
        shares.append(float(capsys.readouterr().out.split("keeps ")[1].split(" %")[0]))
    assert shares[0] == pytest.approx(100, abs=0.01) and 10 < shares[1] < 99
    one = ["export", str(run), "--format", "single-file", "--dtype", "fp32"]
    assert main([*one, "--out", str(tmp_path / "whole.safetensors")]) == 0
    out = tmp_path / "x.safetensors"
    assert main(["export", str(run), "--format", "kohya", "--out", str(out)]) == 2
    assert "--format svd" in capsys.readouterr().err and not out.exists()
    pickle = tmp_path / "x.ckpt"  # is not what would be in it
    assert main(["export", str(run), "--format", "single-file", "--out", str(pickle)]) == 2
    assert "must end so" in capsys.readouterr().err and not pickle.exists()


def test_a_file_that_answers_differently_is_not_left(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """An alpha lost on the way, as other tools lose it."""

    def careless(source: Any, path: Path) -> None:
        exports.write_kohya(source, path)
        tensors = load_file(path)
        save_file({k: v for k, v in tensors.items() if not k.endswith(".alpha")}, path)

    formats = exports.FORMATS | {"kohya": exports.FORMATS["kohya"]._replace(write=careless)}
    monkeypatch.setattr(exports, "FORMATS", formats)
    out = tmp_path / "k.safetensors"
    run = runs("base", False, True)
    assert main(["export", str(run), "--format", "kohya", "--out", str(out)]) == 3
    assert "answers differently" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["loha", "dora", "old"])
def test_what_diffusers_does_not_read_is_folded_in(
    runs: Any, tmp_path: Path, kind: str, capsys: Any
) -> None:
    """As a whole pipeline it answers with the update by its formula."""
    run, path = runs("base", False, False), tmp_path / "x.safetensors"
    base = Path(json.loads((run / "manifest.json").read_text())["parents"]["backbone"]["ref"])
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = UNet2DConditionModel.from_pretrained(base / "unet").get_submodule(layer).weight
    torch.manual_seed(0)
    out, inner = weight.shape
    a, b, c, d = (
        torch.randn(out, 2),
        torch.randn(2, inner),
        torch.randn(out, 2),
        torch.randn(2, inner),
    )
    name = f"lora_unet_{layer.replace('.', '_')}"
    if kind == "loha":
        save_file({f"{name}.hada_w1_a": a, f"{name}.hada_w1_b": b, f"{name}.hada_w2_a": c,
                   f"{name}.hada_w2_b": d, f"{name}.alpha": torch.tensor(1.0)}, path)  # fmt: skip
        wanted = weight + (a @ b) * (c @ d) / 2
    elif kind == "dora":
        size = torch.rand(out) + 1
        save_file({f"{name}.lora_down.weight": b, f"{name}.lora_up.weight": a,
                   f"{name}.dora_scale": size[:, None]}, path)  # fmt: skip
        changed = weight + a @ b
        wanted = changed * (size / changed.norm(dim=1))[:, None]
    else:
        old = layer.replace("to_q", "processor.to_q_lora")
        save_file({f"{old}.down.weight": b, f"{old}.up.weight": a}, path)
        wanted = weight + a @ b
    words = ["export", str(path), "--backbone", str(base), "--format", "merged", "--dtype", "fp32"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0, capsys.readouterr().err
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "whole/unet")
    torch.testing.assert_close(merged.get_submodule(layer).weight, wanted, rtol=1e-5, atol=1e-5)


def test_nothing_is_overwritten(runs: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "k.safetensors"
    out.write_text("mine")
    words = ["export", str(runs("base", False, True)), "--format", "kohya", "--out", str(out)]
    assert main(words) == 2
    assert "is there already" in capsys.readouterr().err and out.read_text() == "mine"


@pytest.mark.parametrize("name", ["sd-v1", "bk-base", "bk-small", "bk-tiny", "bk-v2-base"])
def test_block_numbers_agree_with_diffusers_converter(name: str) -> None:
    """Every tensor of the full-size U-Nets, by value: each is filled with its own number."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = config_of(name)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    keys = list(unet.state_dict())
    names = ldm.unet_names(unet.config, keys)
    assert len(set(names.values())) == len(keys)
    numbered = {names[key]: torch.full((1,), float(i)) for i, key in enumerate(keys)}
    back = convert_ldm_unet_checkpoint(numbered, dict(unet.config))
    assert {key: float(value) for key, value in back.items()} == {
        key: float(i) for i, key in enumerate(keys)
    }


def test_one_file_comes_back_bit_for_bit(runs: Any, tmp_path: Path) -> None:
    """By our own way back, the VAE's matrices and open_clip's joined q, k, v included."""
    run = runs("small", True, False)
    base = Path(json.loads((run / "manifest.json").read_text())["parents"]["backbone"]["ref"])
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    parts = [{k: v.clone() for k, v in m.state_dict().items()}
             for m in (pipe.unet, pipe.vae, pipe.text_encoder)]  # fmt: skip
    for v2 in (False, True):
        whole = ldm.to_ldm((pipe.unet.config, parts[0]), (pipe.vae.config, parts[1]), parts[2], v2)
        back = ldm.from_ldm(
            whole, pipe.unet.config, list(parts[0]), pipe.vae.config, list(parts[1])
        )
        text = {k.removeprefix("text_model."): v for k, v in parts[2].items()}
        for before, after in zip([parts[0], parts[1], text], back, strict=True):
            assert before.keys() == after.keys()
            assert all(torch.equal(before[key], after[key]) for key in before)
