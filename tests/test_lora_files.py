"""Adapter files of every layout in one form; which U-Net each is for; moving between U-Nets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bksdm_tune.cli import main
from bksdm_tune.errors import DataError, UsageError
from bksdm_tune.files.port import layer_map, port
from bksdm_tune.files.write import difference, write_adapter
from bksdm_tune.lora import adapter as adapters
from bksdm_tune.lora import fit, layouts
from bksdm_tune.lora.adapter import Adapter, Update
from bksdm_tune.unet_configs import PLANS, student_config, teacher_of

FAMILY = ("sd-v1", "bk-base", "bk-small", "bk-tiny")
V2 = ("sd-v2", "bk-v2-base", "bk-v2-small", "bk-v2-tiny")
ENDS = ("to_q", "to_v", "to_k", "to_out.0")


def make(name: str, ends: tuple[str, ...] = ENDS, text: bool = True, rank: int = 2) -> Adapter:
    """A random LoRA on layers of an architecture; every layer's numbers are its own."""
    generator = torch.Generator().manual_seed(0)

    def update(out: int, inner: int) -> Update:
        down = torch.randn(rank, inner, generator=generator)
        up = 0.02 * torch.randn(out, rank, generator=generator)
        return Update("lora", {"down": down, "up": up}, 3.0)

    shapes = fit.known_shapes(name)
    updates = {f"unet.{p}": update(*s[:2]) for p, s in shapes.items() if p.endswith(ends)}
    if text:
        width = fit.config_of(name)["cross_attention_dim"]
        for layer in range(2):
            path = f"text_encoder.text_model.encoder.layers.{layer}.self_attn"
            updates |= {f"{path}.{n}": update(width, width) for n in ("q_proj", "v_proj")}
    return Adapter(dict(sorted(updates.items())), "diffusers")


def old_names(adapter: Adapter, prefix: str) -> dict[str, Tensor]:
    """As diffusers wrote attention processors."""
    found = {}
    for layer, update in adapter.updates.items():
        path, end = layer.removeprefix("unet.").replace("to_out.0", "to_out").rsplit(".", 1)
        found[f"{prefix}{path}.processor.{end}_lora.down.weight"] = update.factors["down"]
        found[f"{prefix}{path}.processor.{end}_lora.up.weight"] = update.factors["up"]
    return found


def legacy_text(adapter: Adapter) -> dict[str, Tensor]:
    sides = {"down": "lora_linear_layer.down", "up": "lora_linear_layer.up"}
    return {
        f"{layer}.{sides[factor]}.weight": value
        for layer, update in adapter.updates.items()
        for factor, value in update.factors.items()
        if layer.startswith("text")
    }


def same(a: Adapter, b: Adapter, scale: float = 1.0) -> None:
    assert a.updates.keys() == b.updates.keys()
    for path, update in a.updates.items():
        torch.testing.assert_close(b.updates[path].delta(), scale * update.delta())


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("name", ["bk-small", "sd-v1", "bk-v2-tiny"])
def test_what_is_written_reads_back_the_same(tmp_path: Path, name: str, layout: str) -> None:
    """alpha is 3 at rank 2, text encoder and feed-forward included."""
    adapter = make(name, (*ENDS, "ff.net.0.proj", "ff.net.2"))
    path = tmp_path / "a.safetensors"
    assert write_adapter(path, adapter, layout, None) < 1e-6
    again = layouts.read(path)
    assert again.layout == layout
    same(adapter, again)
    assert {u.alpha for u in again.updates.values()} == {3.0}


def test_layers_of_other_ranks_and_alphas_come_back(tmp_path: Path) -> None:
    adapter = make("bk-tiny")
    paths = list(adapter.updates)
    adapter.updates[paths[0]] = Update(
        "lora", {"down": torch.randn(5, 320), "up": torch.randn(320, 5)}, 1.0
    )  # noqa: E501
    adapter.updates[paths[-1]] = Update("lora", dict(adapter.updates[paths[-1]].factors), None)
    path = tmp_path / "a.safetensors"
    write_adapter(path, adapter, "diffusers", None)
    same(adapter, layouts.read(path))


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_old_diffusers_files(tmp_path: Path, prefix: str) -> None:
    """No alpha in them: it is the rank."""
    adapter = make("bk-base", text=False)
    save_file(old_names(adapter, prefix), tmp_path / "old.safetensors")
    again = layouts.read(tmp_path / "old.safetensors")
    assert again.layout == "diffusers-old"
    same(adapter, again, 2 / 3)


def test_text_encoder_keys_of_any_transformers(tmp_path: Path) -> None:
    adapter = make("bk-base")
    text = {k: u for k, u in adapter.updates.items() if k.startswith("text")}
    for number, tensors in enumerate(
        (legacy_text(adapter),
         {k.replace("text_model.", ""): v for k, v in legacy_text(adapter).items()})
    ):  # fmt: skip
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path)
        same(Adapter(text, ""), layouts.read(path), 2 / 3)


def test_peft_folders(tmp_path: Path) -> None:
    """One for each part, as `save_pretrained` of PEFT leaves them."""
    adapter = make("bk-small")
    for part in ("unet", "text_encoder"):
        (tmp_path / part).mkdir()
        tensors = {
            f"base_model.model.{path.replace('text_model.', '')}.{side}.weight": u.factors[factor]
            for path, u in adapter.of(part).items()
            for factor, side in (("down", "lora_A"), ("up", "lora_B"))
        }
        save_file(tensors, tmp_path / part / "adapter_model.safetensors")
        (tmp_path / part / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3, "r": 2}))
    same(adapter, layouts.read(tmp_path))


@pytest.mark.parametrize("how", ["rslora", "pattern"])
def test_peft_folders_agree_with_peft(tmp_path: Path, how: str) -> None:
    """Against PEFT's own merge: rank-stabilised scale, alphas by the ends of names."""
    from peft import LoraConfig, get_peft_model

    from tiny import make_unet

    torch.manual_seed(0)
    unet = make_unet(size="tiny")
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    more: dict[str, Any] = (
        {"use_rslora": True} if how == "rslora" else {"alpha_pattern": {"to_q": 9}}
    )
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False,
                        **more)  # fmt: skip
    model = get_peft_model(unet, config)
    model.save_pretrained(tmp_path)
    adapter = layouts.read(tmp_path)
    after = model.merge_and_unload().state_dict()
    assert len(adapter.of("unet")) > 10
    for path, update in adapter.of("unet").items():
        key = f"{path}.weight"
        torch.testing.assert_close(update.delta(), after[key] - before[key], rtol=1e-4, atol=1e-5)


def test_lycoris_updates_are_their_formulas(tmp_path: Path) -> None:
    """LoHa, LoKr, LoCon with and without a middle factor, written out; alpha 2 at rank 4."""
    g = torch.Generator().manual_seed(1)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_"
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    mid = "lora_unet_down_blocks_0_resnets_0_conv2"
    t = {
        f"{stem}to_q.hada_w1_a": r(320, 4), f"{stem}to_q.hada_w1_b": r(4, 320),
        f"{stem}to_q.hada_w2_a": r(320, 4), f"{stem}to_q.hada_w2_b": r(4, 320),
        f"{stem}to_k.lokr_w1": r(8, 8), f"{stem}to_k.lokr_w2_a": r(40, 4),
        f"{stem}to_k.lokr_w2_b": r(4, 40),
        f"{conv}.lora_down.weight": r(4, 320, 3, 3), f"{conv}.lora_up.weight": r(320, 4, 1, 1),
        f"{mid}.lora_down.weight": r(4, 320, 1, 1), f"{mid}.lora_mid.weight": r(4, 4, 3, 3),
        f"{mid}.lora_up.weight": r(320, 4, 1, 1),
    }  # fmt: skip
    names = {key.partition(".")[0] for key in t}
    save_file(
        t | {f"{name}.alpha": torch.tensor(2.0) for name in names}, tmp_path / "x.safetensors"
    )
    adapter = layouts.read(tmp_path / "x.safetensors")
    assert adapter.kinds == ["loha", "lokr", "lora"] and len(adapter.updates) == 4
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1."
    loha = (t[f"{stem}to_q.hada_w1_a"] @ t[f"{stem}to_q.hada_w1_b"]) * (
        t[f"{stem}to_q.hada_w2_a"] @ t[f"{stem}to_q.hada_w2_b"]
    )
    torch.testing.assert_close(adapter.updates[f"{block}to_q"].delta(), loha / 2)
    second = t[f"{stem}to_k.lokr_w2_a"] @ t[f"{stem}to_k.lokr_w2_b"]
    lokr = adapter.updates[f"{block}to_k"].delta()
    torch.testing.assert_close(lokr[40:80, :40], t[f"{stem}to_k.lokr_w1"][1, 0] * second / 2)
    x = r(1, 320, 6, 6)
    for name, layers in ((conv, ("down", "up")), (mid, ("down", "mid", "up"))):
        path = name.removeprefix("lora_").replace("unet_", "unet.", 1)
        delta = adapter.updates["unet." + layouts.dotted(path.removeprefix("unet."))].delta()  # type: ignore[operator]
        y = x
        for layer in layers:
            w = t[f"{name}.lora_{layer}.weight"]
            y = torch.nn.functional.conv2d(y, w, padding=w.shape[-1] // 2)
        found = torch.nn.functional.conv2d(x, delta, padding=1)
        torch.testing.assert_close(found, y / 2, rtol=1e-4, atol=2e-2)


def test_dora_is_merged_as_its_paper_says() -> None:
    torch.manual_seed(0)
    weight, down, up = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
    magnitude = torch.rand(6) + 1
    update = Update("lora", {"down": down, "up": up}, 2.0, magnitude)
    merged = update.merged(weight)
    changed = weight + up @ down
    for row in range(6):
        expected = magnitude[row] * changed[row] / changed[row].norm()
        torch.testing.assert_close(merged[row], expected)


@pytest.mark.parametrize("name", [*FAMILY, *V2])
def test_the_architecture_is_told_from_the_layers(name: str) -> None:
    """Names of compressed U-Nets are names of the teacher too; the whole set decides."""
    assert fit.architecture(make(name)) == name


@pytest.mark.parametrize("family", [FAMILY, V2])
def test_ported_layers_change_as_the_original_does(family: tuple[str, ...]) -> None:
    """From the teacher to each student: the layer inherited from L changes exactly as L did."""
    original = make(family[0])
    for name in family[1:]:
        moved, dropped = port(original, family[0], name)
        own = layer_map(name)
        assert len(moved.of("unet")) + len(dropped) == len(original.of("unet"))
        for path, update in moved.of("unet").items():
            torch.testing.assert_close(
                update.delta(), original.of("unet")[own[path]].delta(), rtol=0, atol=0
            )
        assert not fit.misfits(moved, fit.known_shapes(name))
        assert fit.architecture(moved) == name
        back, lost = port(moved, name, family[0])
        assert not lost and set(back.updates) <= set(original.updates)
        for path, update in back.updates.items():
            assert update is original.updates[path]
        assert moved.of("text_encoder").keys() == original.of("text_encoder").keys()


def test_up_blocks_are_renamed() -> None:
    """Two that shapes would not catch: base's up attention 1 is the teacher's 2, tiny's up stage 1
    is the teacher's 2."""
    assert (
        layer_map("bk-base")["up_blocks.1.attentions.1.proj_in"]
        == "up_blocks.1.attentions.2.proj_in"
    )  # noqa: E501
    assert (
        layer_map("bk-tiny")["up_blocks.1.attentions.0.proj_in"]
        == "up_blocks.2.attentions.0.proj_in"
    )  # noqa: E501


def test_nothing_crosses_between_families() -> None:
    with pytest.raises(UsageError, match="different families"):
        port(make("sd-v1"), "sd-v1", "bk-v2-base")


def files(folder: Path, *names: str) -> dict[str, Path]:
    """Foreign files: kohya's keys, nothing of ours in them."""
    found = {}
    for name in names:
        found[name] = folder / f"{name}.safetensors"
        save_file(layouts.kohya_tensors(make(name).updates.items()), found[name])
    return found


@pytest.mark.parametrize(
    ("made_for", "here", "type_this"),
    [("bk-base", "sd-v1", "--from bk-base --to sd-v1"), ("sd-v1", "bk-base", "--to bk-base"),
     ("bk-small", "bk-tiny", "--to bk-tiny"), ("bk-tiny", "bk-small", "--to bk-small"),
     ("bk-small", "bk-base", "--to bk-base"), ("sd-v2", "sd-v1", "--backbone sd-v2")],
)  # fmt: skip
def test_foreign_files_on_another_architecture_are_refused(
    tmp_path: Path, made_for: str, here: str, type_this: str
) -> None:
    path = files(tmp_path, made_for)[made_for]
    with pytest.raises(DataError, match="wrong places") as refused:
        fit.check(path, fit.config_of(here))
    assert type_this in str(refused.value)
    fit.check(path, fit.config_of(made_for))


def test_what_a_partial_file_says_of_itself_decides(tmp_path: Path) -> None:
    """Some layers that SD and bk-base both have: for SD, as the file says, and not for bk-base."""
    whole = make("bk-base", ("attn1.to_q",), text=False)
    some = Adapter(dict(list(whole.updates.items())[:3]), "kohya")
    told = {"ss_base_model_version": "sd_v1"}
    save_file(layouts.kohya_tensors(some.updates.items()), tmp_path / "a.safetensors", told)
    fit.check(tmp_path / "a.safetensors", fit.config_of("sd-v1"))
    with pytest.raises(DataError, match="made for sd-v1;"):
        fit.check(tmp_path / "a.safetensors", fit.config_of("bk-base"))


@pytest.mark.parametrize("made_for", ["sd-v1", "bk-base", "bk-small", "bk-tiny"])
def test_kohyas_family_does_not_hide_the_student(tmp_path: Path, made_for: str) -> None:
    """Kohya's metadata has no word for a compressed U-Net; its layers tell."""
    path = tmp_path / "a.safetensors"
    told = {"ss_base_model_version": "sd_v1"}
    save_file(layouts.kohya_tensors(make(made_for).updates.items()), path, told)
    same = {"bk-small": "bk-tiny", "bk-tiny": "bk-small"}.get(made_for)
    for here in ("sd-v1", "bk-base", "bk-small", "bk-tiny"):
        if here in (made_for, same) and fit.known_shapes(here) == fit.known_shapes(made_for):
            fit.check(path, fit.config_of(here))
        elif here != made_for:
            with pytest.raises(DataError, match=f"made for .*{made_for}"):
                fit.check(path, fit.config_of(here))


@pytest.mark.parametrize(
    "metadata",
    [
        {"bksdm_tune": "{"}, {"bksdm_tune": "[]"}, {"bksdm_tune": "{}"},
        {"bksdm_tune": "[" * 100_000},
        {"lora_adapter_metadata": "{"}, {"lora_adapter_metadata": "[" * 100_000},
        {"lora_adapter_metadata": '{"unet.lora_alpha": NaN}'},
        {"lora_adapter_metadata": '{"unet.alpha_pattern": {"(": 3}}'},
    ],
)  # fmt: skip
def test_odd_metadata_is_one_line(tmp_path: Path, metadata: dict[str, str], capsys: Any) -> None:
    path, out = tmp_path / "a.safetensors", str(tmp_path / "b.safetensors")
    save_file(layouts.diffusers_tensors(make("pocket-tiny")), path, metadata)
    for words in (["info"], ["check", "--backbone", "pocket-tiny"],
                  ["resize", "--rank", "1", "--out", out]):  # fmt: skip
        assert main(["adapter", words[0], str(path), *words[1:]]) == 3
        error = capsys.readouterr().err
        assert "a.safetensors" in error and "Traceback" not in error


def test_nothing_is_overwritten(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "a.safetensors"
    save_file(layouts.diffusers_tensors(make("pocket-tiny")), path)
    before = path.read_bytes()
    assert main(["adapter", "resize", str(path), "--rank", "1", "--out", str(path)]) == 2
    assert main(["adapter", "merge", str(path), str(path), "--out", str(path)]) == 2
    assert "is there already" in capsys.readouterr().err and path.read_bytes() == before


def test_lycoris_on_three_by_three_convolutions(tmp_path: Path) -> None:
    """LoHa and LoKr keep them flat; folded in, each kernel has its own numbers."""
    from bksdm_tune.lora.fold import fold
    from tiny import make_unet

    unet = make_unet(size="tiny")
    weights = {
        name: getattr(unet.down_blocks[0].resnets[0], name).weight for name in ("conv1", "conv2")
    }
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    out, inner = before["conv1"].shape[:2]
    r = torch.randn
    stem = "lora_unet_down_blocks_0_resnets_0_"
    tensors = {
        f"{stem}conv1.hada_w1_a": r(out, 2), f"{stem}conv1.hada_w1_b": r(2, inner * 9),
        f"{stem}conv1.hada_w2_a": r(out, 2), f"{stem}conv1.hada_w2_b": r(2, inner * 9),
        f"{stem}conv2.lokr_w1": r(2, 2), f"{stem}conv2.lokr_w2_a": r(out // 2, 2),
        f"{stem}conv2.lokr_w2_b": r(2, before["conv2"].shape[1] // 2 * 9),
    }  # fmt: skip
    path = tmp_path / "lycoris.safetensors"
    save_file(tensors, path)
    adapter = fit.check(path, unet.config)
    fold({"unet": unet}, adapter, path)
    t = {key.removeprefix(stem): value for key, value in tensors.items()}
    loha = (t["conv1.hada_w1_a"] @ t["conv1.hada_w1_b"]) * (
        t["conv1.hada_w2_a"] @ t["conv1.hada_w2_b"]
    )
    change = weights["conv1"] - before["conv1"]
    torch.testing.assert_close(change, loha.reshape(change.shape), rtol=1e-4, atol=1e-4)
    second = (t["conv2.lokr_w2_a"] @ t["conv2.lokr_w2_b"]).reshape(out // 2, -1, 3, 3)
    block = (weights["conv2"] - before["conv2"])[out // 2 :, : second.shape[1]]
    wanted = t["conv2.lokr_w1"][1, 0] * second
    torch.testing.assert_close(block, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lokr", "dora"])
def test_pefts_own_scales(tmp_path: Path, kind: str) -> None:
    """LoKr by two whole factors, and DoRA on convolutions, as PEFT itself computes them."""
    from peft import LoKrConfig, LoraConfig, get_peft_model

    from bksdm_tune.lora.fold import fold
    from tiny import make_unet

    torch.manual_seed(0)
    unet, plain = make_unet(size="tiny"), make_unet(size="tiny")
    plain.load_state_dict(unet.state_dict())
    if kind == "lokr":  # a rank so large that nothing is decomposed
        config: Any = LoKrConfig(r=64, alpha=16, target_modules=["to_q"])
    else:
        config = LoraConfig(r=2, lora_alpha=3, target_modules=["conv1"], use_dora=True)
    model = get_peft_model(unet, config)
    for name, value in model.named_parameters():
        if "lokr_" in name or "lora_" in name:
            value.data = 0.1 * torch.randn_like(value) + (value.data if "magnitude" in name else 0)
    model.save_pretrained(tmp_path)
    fold({"unet": plain}, fit.check(tmp_path, plain.config), tmp_path)
    merged, folded = model.merge_and_unload().state_dict(), plain.state_dict()
    assert merged.keys() == folded.keys()
    for key, value in merged.items():
        torch.testing.assert_close(folded[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    ("made_for", "here"),
    [("base", "teacher"), ("small", "tiny"), ("tiny", "small"), ("teacher", "base")],
)
def test_widths_that_no_registry_knows(tmp_path: Path, made_for: str, here: str) -> None:
    """A file without metadata: the blocks of the U-Net it is for are told from its layers."""
    from tiny import unet_config

    def config(size: str) -> dict[str, Any]:
        return student_config(unet_config(), PLANS[size])

    shapes = {p: s for p, s in fit.layer_shapes(config(made_for)).items() if p.endswith(ENDS)}
    lora = {p: {"down": torch.ones(1, s[1]), "up": torch.ones(s[0], 1)} for p, s in shapes.items()}
    updates = {f"unet.{path}": Update("lora", factors) for path, factors in lora.items()}
    path = tmp_path / "a.safetensors"
    save_file(layouts.kohya_tensors(updates.items()), path)
    fit.check(path, config(made_for))
    with pytest.raises(DataError, match="wrong places") as refused:
        fit.check(path, config(here))
    assert f"the {made_for} U-Net of these widths" in str(refused.value)
    assert teacher_of(config(made_for), PLANS[made_for]) == config("teacher")


def test_text_of_another_width_is_refused(tmp_path: Path) -> None:
    """A text encoder's adapter alone says so by its width."""
    whole = make("bk-v2-base")
    text = Adapter({k: u for k, u in whole.updates.items() if k.startswith("text")}, "kohya")
    path = tmp_path / "a.safetensors"
    save_file(layouts.kohya_tensors(text.updates.items()), path)
    fit.check(path, fit.config_of("sd-v2"))
    with pytest.raises(DataError, match="sd-v2 or bk-v2-base"):
        fit.check(path, fit.config_of("bk-base"))


def test_lycoris_files_cross_as_they_are(tmp_path: Path, capsys: Any) -> None:
    """LoHa, LoKr and DoRA have no low rank to write in diffusers' layout; their factors move."""
    r = torch.randn
    layer = "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn1_to_"
    tensors = {
        f"{layer}q.hada_w1_a": r(1280, 2), f"{layer}q.hada_w1_b": r(2, 1280),
        f"{layer}q.hada_w2_a": r(1280, 2), f"{layer}q.hada_w2_b": r(2, 1280),
        f"{layer}k.lokr_w1": r(2, 2), f"{layer}k.lokr_w2_a": r(640, 2),
        f"{layer}k.lokr_w2_b": r(2, 384), f"{layer}v.lora_down.weight": r(2, 768),
        f"{layer}v.lora_up.weight": r(1280, 2), f"{layer}v.dora_scale": r(1280, 1),
    }  # fmt: skip
    for name in "kv":  # attn2 alone looks at the text
        tensors = {k.replace(f"attn1_to_{name}", f"attn2_to_{name}"): v for k, v in tensors.items()}
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors, path)
    words = ["port", str(path), "--from", "sd-v1", "--to", "bk-base", "--out", str(out)]
    assert main(words) == 0, capsys.readouterr().err
    before, after = layouts.read(path), layouts.read(out)
    assert after.kinds == ["loha", "lokr", "lora+dora"]
    for name in ("attn1.to_q", "attn2.to_k", "attn2.to_v"):
        one, other = (
            a.updates[f"unet.up_blocks.1.attentions.{n}.transformer_blocks.0.{name}"]
            for a, n in ((before, 2), (after, 1))
        )
        torch.testing.assert_close(one.delta(), other.delta())
        assert (one.magnitude is None) == (other.magnitude is None)
    heal = [*words[:-1], str(tmp_path / "c.safetensors"), "--heal", "--subject", "sks dog"]
    assert main(heal) == 2 and "plain LoRAs" in capsys.readouterr().err


def test_the_command_that_is_named_works(tmp_path: Path, capsys: Any) -> None:
    path = files(tmp_path, "sd-v1")["sd-v1"]
    with pytest.raises(DataError) as refused:
        fit.check(path, fit.config_of("bk-small"))
    words = str(refused.value).split("bksdm-tune ")[1].rstrip(".").split()
    assert main(words) == 0
    assert "Dropped" in capsys.readouterr().out
    fit.check(Path(words[-1]), fit.config_of("bk-small"))
    assert main(["adapter", "info", words[-1], "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)
    assert facts["made_for"] == ["bk-small"] and facts["alphas"] == [3.0]


def test_a_peft_folder_draws_and_is_checked(tmp_path: Path, capsys: Any) -> None:
    """As a folder and as the file in it, alpha from the config beside it."""
    adapter = make("pocket-tiny", text=False)
    folder = tmp_path / "peft"
    folder.mkdir()
    tensors = {
        f"base_model.model.{path}.{side}.weight": u.factors[factor]
        for path, u in adapter.of("unet").items()
        for factor, side in (("down", "lora_A"), ("up", "lora_B"))
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3, "r": 2}))
    same(adapter, layouts.read(folder / "adapter_model.safetensors"))
    assert main(["adapter", "check", str(folder), "--backbone", "pocket-tiny"]) == 0
    words = ["--backbone", "pocket-tiny", "--prompt", "a dog", "--steps", "2"]
    assert main(["generate", str(folder), *words, "--out", str(tmp_path / "drawn")]) == 0
    out = tmp_path / "merged"
    more = ["--backbone", "pocket-tiny", "--format", "merged", "--dtype", "fp32", "--out", str(out)]
    assert main(["export", str(folder), *more]) == 0


def test_a_text_encoder_alone_can_be_resized(tmp_path: Path, capsys: Any) -> None:
    whole = make("bk-tiny", rank=4)
    text = Adapter({k: u for k, u in whole.updates.items() if k.startswith("text")}, "diffusers")
    write_adapter(tmp_path / "text.safetensors", text, "diffusers", None)
    out = tmp_path / "small.safetensors"
    words = ["--rank", "2", "--out", str(out)]
    assert main(["adapter", "resize", str(tmp_path / "text.safetensors"), *words]) == 0
    assert {u.rank for u in layouts.read(out).updates.values()} == {2}


def test_merged_is_the_weighted_sum() -> None:
    a, b = make("bk-tiny"), make("bk-tiny", ("to_q",), text=False, rank=3)
    whole = adapters.merge([a, b], [0.5, 2.0])
    for path in a.updates:
        wanted = 0.5 * a.updates[path].delta()
        if path in b.updates:
            wanted = wanted + 2 * b.updates[path].delta()
        torch.testing.assert_close(whole.updates[path].delta(), wanted, rtol=1e-4, atol=1e-4)


def test_resized_is_the_nearest_of_its_rank() -> None:
    torch.manual_seed(0)
    update = Update("lora", {"down": torch.randn(6, 30), "up": torch.randn(20, 6)}, 6.0)
    smaller, energy = adapters.resized(update, 3)
    s = torch.linalg.svdvals(update.delta().double())
    error = (update.delta() - smaller.delta()).double().square().sum()
    assert float(error) == pytest.approx(float(s[3:].square().sum()), rel=1e-4)
    assert energy == pytest.approx(float(s[:3].square().sum() / s.square().sum()))
    assert difference(
        Adapter({"unet.x": update}, ""), Adapter({"unet.x": adapters.resized(update, 9)[0]}, "")
    ) < 1e-5  # fmt: skip


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "pickle":
        torch.save({"unet.x.lora_A.weight": torch.ones(1)}, path)
    elif how == "oversized header":
        path.write_bytes((2**40).to_bytes(8, "little") + data[8:])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "integers":
        save_file({"unet.x.to_q.lora_A.weight": torch.ones(2, 3, dtype=torch.int32)}, path)
    elif how == "not finite":
        save_file({"unet.x.to_q.lora_A.weight": torch.full((2, 3), float("nan"))}, path)
    elif how == "half a pair":
        save_file({"unet.x.to_q.lora_A.weight": torch.ones(2, 3)}, path)
    elif how == "factors apart":
        save_file({"unet.x.to_q.lora_A.weight": torch.ones(2, 3),
                   "unet.x.to_q.lora_B.weight": torch.ones(5, 4)}, path)  # fmt: skip
    elif how == "a whole model":
        save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 3)}, path)
    else:
        path.unlink()


SPOILS = ("truncated", "pickle", "oversized header", "empty", "integers", "not finite",
          "half a pair", "factors apart", "a whole model", "gone")  # fmt: skip


@pytest.mark.parametrize("how", SPOILS)
def test_bad_files_are_one_line_and_nothing_is_written(
    tmp_path: Path, how: str, capsys: Any
) -> None:
    path = files(tmp_path, "bk-tiny")["bk-tiny"]
    spoil(path, how)
    out = tmp_path / "out/x.safetensors"
    for words in (["adapter", "info", str(path)],
                  ["adapter", "resize", str(path), "--rank", "1", "--out", str(out)],
                  ["port", str(path), "--to", "sd-v1", "--out", str(out)]):  # fmt: skip
        assert main(words) == 3
        error = capsys.readouterr().err
        assert str(path) in error and len(error.strip().splitlines()) == 1
    assert not out.exists()
