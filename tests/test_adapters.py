"""Adapter files: stock diffusers sees what we trained, and a wrong file is refused."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, save, save_file
from torch import Tensor, nn

import bksdm_tune.adapted as adapted_module
import tiny
from bksdm_tune.adapted import adapted, folds, lean_forward
from bksdm_tune.adapters import (
    canonical,
    inject,
    injected,
    load_adapter,
    read_adapter,
    save_adapter,
)
from bksdm_tune.architecture import describe, fingerprint
from bksdm_tune.errors import DataError, UsageError
from bksdm_tune.lora import fit, layouts
from bksdm_tune.provenance import Provenance
from bksdm_tune.resolve import ADAPTER
from bksdm_tune.trainables import LoraWeights

UNET_TARGETS = ("to_q", "to_v", "to_out.0", "ff.net.0.proj")
TEXT_TARGETS = ("q_proj", "v_proj")
SIZES = ("teacher", "base", "small", "tiny")
MADE_FROM = Provenance("bk-base", "0123456789abcdef", "SD-v1 shape, base", "a xyz dog", "run-key")


def randomised(parameters: list[torch.nn.Parameter]) -> None:
    """B starts at zero, which would hide a wrong scale."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, 0.3)


def tuned(pipeline: Any, text: bool = True) -> tuple[Any, Any]:
    unet, encoder = pipeline.unet, pipeline.text_encoder
    torch.manual_seed(1)
    randomised(inject(unet, 2, 3.0, 0.0, UNET_TARGETS))
    if text:
        randomised(inject(encoder, 3, 2.0, 0.0, TEXT_TARGETS))
    return unet, encoder


def tiny_models(size: str = "tiny") -> Any:
    class Models:
        unet = tiny.make_unet(size=size)
        text_encoder = tiny.make_text_encoder()

    return Models


def predict(unet: Any, encoder: Any) -> tuple[Tensor, Tensor]:
    """What the U-Net and the text encoder say to fixed inputs."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    with torch.no_grad():
        text = encoder(torch.arange(77)[None])[0]
        return unet(latents, 500, text).sample, text


def difference(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> list[float]:
    return [(x - y).abs().max().item() for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("text", [True, False], ids=["unet+text", "unet"])
@pytest.mark.parametrize("size", SIZES)
def test_stock_diffusers_loads_what_was_trained(tmp_path: Path, size: str, text: bool) -> None:
    folder = tiny.make_pipeline(tmp_path / "base", size=size)
    live = StableDiffusionPipeline.from_pretrained(folder)
    before = predict(live.unet, live.text_encoder)
    unet, encoder = tuned(live, text)
    wanted = predict(unet, encoder)
    changes = difference(wanted, before)
    assert changes[0] > 1e-2 and (changes[1] > 1e-2) == text

    save_adapter(tmp_path / ADAPTER, unet, encoder if text else None, MADE_FROM)
    stock = StableDiffusionPipeline.from_pretrained(folder)
    stock.load_lora_weights(tmp_path)
    assert max(difference(predict(stock.unet, stock.text_encoder), wanted)) < 1e-5


def test_a_fused_adapter_draws_the_same(tmp_path: Path) -> None:
    folder = tiny.make_pipeline(tmp_path / "base", size="base")
    live = StableDiffusionPipeline.from_pretrained(folder)
    unet, encoder = tuned(live)
    wanted = predict(unet, encoder)
    save_adapter(tmp_path / ADAPTER, unet, encoder, MADE_FROM)
    stock = StableDiffusionPipeline.from_pretrained(folder)
    stock.load_lora_weights(tmp_path)
    stock.fuse_lora()
    stock.unload_lora_weights()
    assert max(difference(predict(stock.unet, stock.text_encoder), wanted)) < 1e-4


def test_keys_are_those_of_the_ecosystem(tmp_path: Path) -> None:
    unet, encoder = tuned(tiny_models("tiny"))
    save_adapter(tmp_path / ADAPTER, unet, encoder, MADE_FROM)
    tensors, metadata = read_adapter(tmp_path / ADAPTER)
    unet_keys = [key for key in tensors if key.startswith("unet.")]
    text_keys = [key for key in tensors if key.startswith("text_encoder.text_model.encoder.")]
    assert len(unet_keys) == 9 * 7 * 2  # blocks, targets (3 in each attention, 1), A and B
    assert len(text_keys) == 2 * 2 * 2  # layers, targets, A and B
    assert len(tensors) == len(unet_keys) + len(text_keys)
    assert all("lora" in key for key in tensors)
    adapter = json.loads(metadata["lora_adapter_metadata"])
    assert (adapter["unet.r"], adapter["unet.lora_alpha"]) == (2, 3.0)
    assert (adapter["text_encoder.r"], adapter["text_encoder.lora_alpha"]) == (3, 2.0)
    assert adapter["unet.target_modules"] == sorted(UNET_TARGETS)


def test_provenance_comes_back(tmp_path: Path) -> None:
    path = tmp_path / ADAPTER
    save_adapter(path, *tuned(tiny_models()), MADE_FROM)
    assert layouts.read(path).made_from == MADE_FROM
    save_file(read_adapter(path)[0], tmp_path / "foreign.safetensors")
    assert layouts.read(tmp_path / "foreign.safetensors").made_from is None


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_adapter(tmp_path / name, *tuned(tiny_models()), MADE_FROM)
    data = (tmp_path / "a").read_bytes()
    assert data == (tmp_path / "b").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert list(header.pop("__metadata__")) == ["bksdm_tune", "format", "lora_adapter_metadata"]
    assert list(header) == sorted(header) and length % 8 == 0
    assert canonical(data) == data


def test_the_header_is_sorted_and_the_data_stay_in_place() -> None:
    """safetensors orders by dtype first, and its metadata by the hash of the day."""
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.arange(2.0)}
    data = canonical(save(tensors, {"z": "1", "y": "2", "x": "3"}))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert list(header) == ["__metadata__", "a", "b"] and length % 8 == 0
    assert list(header["__metadata__"]) == ["x", "y", "z"]
    loaded = load(data)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_load_restores_bit_for_bit(tmp_path: Path) -> None:
    unet, encoder = tuned(tiny_models())
    save_adapter(tmp_path / ADAPTER, unet, encoder, MADE_FROM)
    saved = [p.detach().clone() for p in trained(unet, encoder)]
    assert len(saved) == 126 + 8
    randomised(trained(unet, encoder))
    load_adapter(tmp_path / ADAPTER, unet, encoder)
    for parameter, value in zip(trained(unet, encoder), saved, strict=True):
        assert parameter.requires_grad and torch.equal(parameter, value)


def trained(*models: Any) -> list[torch.nn.Parameter]:
    return [p for model in models for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_file_without_a_part_is_not_half_loaded(tmp_path: Path, part: str) -> None:
    unet, encoder = tuned(tiny_models())
    save_adapter(tmp_path / ADAPTER, unet, encoder, MADE_FROM)
    tensors, metadata = read_adapter(tmp_path / ADAPTER)
    own = [key for key in tensors if key.startswith(part)]
    del tensors[own[0]]
    save_file(tensors, tmp_path / ADAPTER, metadata)
    with pytest.raises(DataError, match=f"1 of {len(own)} tensors"):
        load_adapter(tmp_path / ADAPTER, unet, encoder)


def test_adapters_train_in_float32_on_a_half_precision_base() -> None:
    unet = tiny.make_unet(size="tiny").half()
    parameters = inject(unet, 2, 3.0, 0.0, UNET_TARGETS)
    assert len(parameters) == 126 and {p.dtype for p in parameters} == {torch.float32}
    assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {torch.float16}


def layer_of(width: int, out: int, rank: int, dropout: float = 0.0) -> Any:
    model = nn.Sequential(nn.Linear(width, out)).double()
    config = LoraConfig(r=rank, lora_alpha=3, lora_dropout=dropout, target_modules=["0"])
    layer = get_peft_model(model, config).base_model.model[0].double()
    torch.manual_seed(2)
    randomised([layer.lora_B["default"].weight])
    return layer


def gradients_of(layer: Any, forward: Any) -> list[Tensor]:
    torch.manual_seed(3)
    rows = torch.randn(2, 5, layer.in_features, dtype=torch.float64, requires_grad=True)
    answer = forward(rows)
    answer.square().sum().backward()
    tensors = [rows, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    found = [answer.detach(), *(tensor.grad.clone() for tensor in tensors)]
    layer.zero_grad()
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("width", "out"), [(6, 8), (200, 300)])
def test_our_forward_is_pefts(width: int, out: int, dropout: float) -> None:
    layer = layer_of(width, out, 2, dropout)
    rows = torch.ones(100, width)
    assert folds(layer.base_layer, layer.lora_A["default"].weight, rows) == (width == 6)
    theirs = gradients_of(layer, functools.partial(type(layer).forward, layer))
    ours = gradients_of(layer, functools.partial(lean_forward, layer, "default"))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("width", "out"), [(6, 8), (200, 300)])
def test_stacked_rows_meet_their_own_adapter(width: int, out: int) -> None:
    layer = layer_of(width, out, 2)
    down, up = (side["default"].weight.detach() for side in (layer.lora_A, layer.lora_B))
    downs, ups = (torch.stack([side, side.flip(0) * 2]) for side in (down, up))
    rows = torch.randn(4, 5, width, dtype=torch.float64)
    together = adapted(rows, layer.base_layer, downs, ups, 1.5)
    alone = [
        adapted(rows[2 * i : 2 * i + 2], layer.base_layer, downs[i], ups[i], 1.5) for i in (0, 1)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-12)


def test_nothing_is_folded_where_the_sum_would_be_rounded() -> None:
    layer, rows = layer_of(6, 8, 2), torch.ones(100, 6)
    down = layer.lora_A["default"].weight
    with torch.autocast("cpu", torch.bfloat16):
        assert not folds(layer.base_layer, down, rows)
    assert not folds(layer.base_layer.bfloat16(), down, rows)
    assert not folds(layer.base_layer, down.expand(99, -1, -1), rows)


def after(weights: LoraWeights, optimiser: torch.optim.Optimizer, steps: int) -> Tensor:
    """A prediction after so many steps with clipped gradients."""
    torch.manual_seed(3)
    inputs = torch.randn(2, 4, 16, 16).double(), torch.tensor([5, 700])
    text = torch.randn(2, 7, tiny.TEXT_WIDTH).double()
    for _ in range(steps):
        weights.unet(*inputs, text).sample.square().mean().backward()
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 1e-3)
        optimiser.step()
        optimiser.zero_grad()
    return weights.unet(*inputs, text).sample.detach()


def learning(folds_them: bool) -> tuple[LoraWeights, torch.optim.Optimizer]:
    unet = tuned(tiny_models("base"), text=False)[0].double().train()
    weights = LoraWeights(unet, None, (0.1, 0.1), MADE_FROM)
    count = sum(p.numel() for p in weights.parameter_groups()[0]["params"])
    if folds_them:
        weights = weights.fold()
    (group,) = weights.parameter_groups()
    assert sum(p.numel() for p in group["params"]) == count
    optimiser = torch.optim.AdamW([group])
    weights.store_apart(optimiser)
    return weights, optimiser


@pytest.fixture(params=[adapted_module.FOLD_UP_TO, 2], ids=["all small", "some small"])
def fold_up_to(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(adapted_module, "FOLD_UP_TO", request.param)
    return int(request.param)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_folded_layers_train_as_alone(tmp_path: Path, checkpointing: bool, fold_up_to: int) -> None:
    found, tensors = [], []
    for folds_them in (False, True):
        weights, optimiser = learning(folds_them)
        tensors.append(len(optimiser.param_groups[0]["params"]))
        if checkpointing:
            weights.unet.enable_gradient_checkpointing()
        answer = after(weights, optimiser, 2)
        weights.save(tmp_path)
        found.append((answer, read_adapter(tmp_path / ADAPTER)[0]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    assert tensors[1] == 1 if fold_up_to > 2 else 1 < tensors[1] < tensors[0]


@pytest.mark.parametrize("before", [False, True])
def test_a_run_goes_on_whether_layers_are_folded_or_not(
    tmp_path: Path, before: bool, fold_up_to: int
) -> None:
    whole = after(*learning(not before), 3)
    weights, optimiser = learning(before)
    after(weights, optimiser, 2)
    weights.save(tmp_path)
    state = copy.deepcopy(optimiser.state_dict())
    later, other = learning(not before)
    later.load(tmp_path)
    other.load_state_dict(state)
    torch.testing.assert_close(after(later, other, 1), whole, rtol=1e-9, atol=1e-12)
    again = learning(before)[1]
    again.load_state_dict(state)
    assert_equal(again.state_dict(), state)


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
    for number, own in a["state"].items():
        assert own.keys() == b["state"][number].keys()
        assert all(torch.equal(value, b["state"][number][key]) for key, value in own.items())


def test_folded_layers_are_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = LoraWeights(*tuned(tiny_models()), (0.1, 0.1), MADE_FROM)
    saved.save(tmp_path)
    torch.manual_seed(0)
    unet, encoder = tuned(tiny_models())
    randomised([p for model in (unet, encoder) for p in model.parameters() if p.requires_grad])
    loaded = LoraWeights(unet, encoder, (0.1, 0.1), MADE_FROM).fold()
    loaded.load(tmp_path)
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([5, 700]), torch.randn(2, 7, tiny.TEXT_WIDTH)
    ids = torch.tensor([[512, 5, 6, 513]])
    for theirs, ours, given in (
        (saved.unet, unet, inputs),
        (saved.text_encoder, encoder, (ids,)),
    ):
        torch.testing.assert_close(ours(*given)[0], theirs(*given)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dropout", "base"), [(0.5, torch.float32), (0.0, torch.bfloat16)])
def test_not_everything_is_folded(dropout: float, base: torch.dtype) -> None:
    unet = tiny.make_unet(size="tiny").to(base)
    inject(unet, 2, 3.0, dropout, UNET_TARGETS)
    weights = LoraWeights(unet, None, (0.1, 0.1), MADE_FROM)
    before = [layer.forward for layer in injected(unet)]
    groups = weights.parameter_groups()
    assert weights.fold().parameter_groups() == groups
    assert [layer.forward for layer in injected(unet)] == before


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_mixed_precision_is_pefts_too(base: torch.dtype) -> None:
    layer = layer_of(6, 8, 2).float()
    layer.base_layer.to(base)
    rows = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        theirs = type(layer).forward(layer, rows)
        ours = lean_forward(layer, "default", rows)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("made_for", SIZES)
def test_another_architecture_is_refused(tmp_path: Path, made_for: str, size: str) -> None:
    made_config, here = tiny.unet_config(size=made_for), tiny.unet_config(size=size)
    made_from = replace(
        MADE_FROM, architecture=fingerprint(made_config), shape=describe(made_config)
    )
    models = tiny_models("tiny")
    path = tmp_path / ADAPTER
    save_adapter(path, tuned(models)[0], None, made_from)
    if made_for == size:
        fit.check(path, here)
        return
    with pytest.raises(DataError, match="was made for bk-base.*--backbone bk-base"):
        fit.check(path, here)


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "pickle", "no lora"])
def test_a_damaged_file_is_reported(tmp_path: Path, damage: str) -> None:
    path = tmp_path / ADAPTER
    save_adapter(path, tuned(tiny_models())[0], None, MADE_FROM)
    if damage == "missing":
        path.unlink()
    elif damage == "pickle":
        torch.save({"unet.x.lora.up.weight": torch.ones(1)}, path)
    elif damage == "no lora":
        save_file({"conv_in.weight": torch.ones(1)}, path)
    else:
        path.write_bytes(path.read_bytes()[: 5000 if damage == "cut" else 0])
    with pytest.raises(DataError, match=ADAPTER):
        read_adapter(path)


def test_an_unknown_target_is_named() -> None:
    unet = tiny.make_unet(size="tiny")
    with pytest.raises(UsageError, match="'to_w' matches no linear layer"):
        inject(unet, 2, 2.0, 0.0, ("to_q", "to_w"))
    assert all(p.requires_grad for p in unet.parameters())  # nothing was touched
