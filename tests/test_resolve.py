"""From a name, folder, Hub id or run to the folders that hold a model's parts."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from bksdm_tune import resolve as resolve_module
from bksdm_tune.artifacts import write_manifest
from bksdm_tune.backbones import BACKBONES
from bksdm_tune.errors import DataError, UsageError
from bksdm_tune.resolve import ADAPTER, hash_weights, local_snapshot, resolve, unet_config
from tiny import make_pipeline


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("made") / "pipeline")


@pytest.fixture
def pipeline(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "pipeline"))


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty Hub cache."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    yield folder


def put_in_hub_cache(cache: Path, hub_id: str, folder: Path) -> Path:
    """What a download of ``hub_id`` leaves in the cache."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return Path(shutil.copytree(folder, repository / "snapshots" / ("0" * 40)))


def put_lora_run(folder: Path, backbone: dict[str, str | None]) -> Path:
    folder.mkdir()
    (folder / ADAPTER).write_bytes(b"weights")
    write_manifest(folder, "dreambooth-lora", {}, {"backbone": backbone})
    return folder


def test_a_pipeline_folder(pipeline: Path) -> None:
    parts = resolve(str(pipeline))
    assert (parts.name, parts.ref) == ("pipeline", str(pipeline))
    assert (parts.unet, parts.root) == (pipeline / "unet", pipeline)
    assert parts.backbone is None and parts.adapter is None and parts.base is None
    assert unet_config(parts)["block_out_channels"] == [4, 8, 12, 12]


def test_a_relative_folder_resolves_from_anywhere(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pipeline.parent)
    parts = resolve("pipeline")
    monkeypatch.chdir("/")
    assert resolve(parts.ref) == parts


def test_a_pocket_name_is_materialised(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pocket = ModuleType("bksdm_tune.pocket")
    monkeypatch.setattr(pocket, "materialise", {"pocket-tiny": pipeline}.__getitem__, raising=False)
    monkeypatch.setitem(sys.modules, "bksdm_tune.pocket", pocket)
    parts = resolve("pocket-tiny")
    assert parts.root == pipeline and parts.backbone is BACKBONES["pocket-tiny"]
    assert parts.ref == "pocket-tiny"


@pytest.mark.parametrize("ref", ["bk-tiny", "nota-ai/bk-sdm-tiny"])
def test_a_cached_hub_model_by_either_name(ref: str, pipeline: Path, hub_cache: Path) -> None:
    snapshot = put_in_hub_cache(hub_cache, "nota-ai/bk-sdm-tiny", pipeline)
    parts = resolve(ref)
    assert (parts.ref, parts.root) == (ref, snapshot)
    assert parts.backbone is BACKBONES["bk-tiny"]


def test_a_hub_model_that_is_not_on_disk_says_what_to_do() -> None:
    with pytest.raises(DataError, match="(?s)nota-ai/bk-sdm-tiny is not on this disk.*pocket-base"):
        resolve("bk-tiny")


def test_a_half_downloaded_model_is_not_local(pipeline: Path, hub_cache: Path) -> None:
    snapshot = put_in_hub_cache(hub_cache, "someone/model", pipeline)
    assert local_snapshot("someone/model") == snapshot
    (snapshot / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert local_snapshot("someone/model") is None


def test_a_cached_unet_repository_with_a_base(pipeline: Path, hub_cache: Path) -> None:
    snapshot = put_in_hub_cache(hub_cache, "someone/unet", pipeline / "unet")
    parts = resolve("someone/unet", str(pipeline))
    assert (parts.unet, parts.root) == (snapshot, pipeline)


def test_only_what_is_needed_is_downloaded() -> None:
    published = """.gitattributes LICENSE.md README.md feature_extractor/preprocessor_config.json
    model_index.json scheduler/scheduler_config.json text_encoder/config.json
    text_encoder/model.fp16.safetensors text_encoder/model.safetensors
    text_encoder/pytorch_model.bin tokenizer/merges.txt tokenizer/vocab.json unet/config.json
    unet/diffusion_pytorch_model.bin unet/diffusion_pytorch_model.fp16.safetensors
    unet/diffusion_pytorch_model.non_ema.safetensors unet/diffusion_pytorch_model.safetensors
    v1-5-pruned.ckpt v1-5-pruned.safetensors vae/diffusion_pytorch_model.safetensors""".split()
    wanted = filter_repo_objects(
        published,
        allow_patterns=resolve_module.WANTED,
        ignore_patterns=resolve_module.UNWANTED,
    )
    assert (
        list(wanted)
        == """LICENSE.md feature_extractor/preprocessor_config.json
    model_index.json scheduler/scheduler_config.json text_encoder/config.json
    text_encoder/model.safetensors tokenizer/merges.txt tokenizer/vocab.json unet/config.json
    unet/diffusion_pytorch_model.safetensors vae/diffusion_pytorch_model.safetensors""".split()
    )


@pytest.mark.parametrize("inside", [False, True], ids=["folder", "unet/ below it"])
def test_a_unet_folder_takes_its_other_parts_from_the_base(
    inside: bool, pipeline: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "alone"
    unet = Path(shutil.copytree(pipeline / "unet", folder / "unet" if inside else folder))
    parts = resolve(str(folder), base=str(pipeline))
    assert (parts.unet, parts.root, parts.base) == (unet, pipeline, str(pipeline))
    assert resolve(parts.ref, parts.base) == parts


def test_a_unet_folder_alone_needs_a_base(pipeline: Path) -> None:
    with pytest.raises(UsageError, match="--base"):
        resolve(str(pipeline / "unet"))


def test_a_lora_run_is_its_backbone_and_an_adapter(pipeline: Path, tmp_path: Path) -> None:
    run = put_lora_run(tmp_path / "run", {"ref": str(pipeline)})
    parts = resolve(str(run))
    assert parts.adapter == run / ADAPTER
    assert (parts.root, parts.ref) == (pipeline, str(pipeline))


def test_a_lora_run_on_a_combined_backbone(pipeline: Path, tmp_path: Path) -> None:
    unet = Path(shutil.copytree(pipeline / "unet", tmp_path / "alone"))
    run = put_lora_run(tmp_path / "run", {"ref": str(unet), "base": str(pipeline)})
    parts = resolve(str(run))
    assert (parts.unet, parts.root) == (unet, pipeline)


def test_a_lora_run_whose_backbone_moved(pipeline: Path, tmp_path: Path) -> None:
    run = put_lora_run(tmp_path / "run", {"ref": str(tmp_path / "gone"), "base": None})
    with pytest.raises(DataError, match="(?s)gone.*--base"):
        resolve(str(run))
    assert resolve(str(run), base=str(pipeline)).root == pipeline


def test_a_full_run_is_a_pipeline(pipeline: Path) -> None:
    write_manifest(pipeline, "dreambooth-full", {}, {"backbone": {"ref": "pocket-base"}})
    assert resolve(str(pipeline)).unet == pipeline / "unet"


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="model_index.json.*manifest.json.*config.json"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(("ref", "close"), [("pocket-bas", "pocket-base"), ("zzz", "lists them")])
def test_neither_a_name_nor_a_folder(ref: str, close: str) -> None:
    with pytest.raises(UsageError, match=close):
        resolve(ref)


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "vae", "scheduler"])
def test_a_missing_part_is_named(part: str, pipeline: Path) -> None:
    shutil.rmtree(pipeline / part)
    with pytest.raises(DataError, match=f"lacks {part}\\."):
        resolve(str(pipeline))


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_pickles_are_refused_with_the_way_to_convert(part: str, pipeline: Path) -> None:
    (weights,) = (pipeline / part).glob("*.safetensors")
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(DataError, match="(?s)pytorch_model.bin.*save_pretrained") as caught:
        resolve(str(pipeline))
    assert f"DiffusionPipeline as M; M.from_pretrained('{pipeline}')" in str(caught.value)


def test_an_fp16_variant_alone_is_refused(pipeline: Path) -> None:
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    with pytest.raises(DataError, match="variant='fp16'"):
        resolve(str(pipeline))


def test_a_broken_config_is_bad_data(pipeline: Path) -> None:
    (pipeline / "unet" / "config.json").write_text("{")
    with pytest.raises(DataError, match="config.json cannot be read"):
        resolve(str(pipeline))


def test_weights_are_read_once(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def sha256(path: Path) -> str:
        read.append(path)
        return path.name

    monkeypatch.setattr(resolve_module, "sha256_file", sha256)
    assert hash_weights(pipeline / "unet") == hash_weights(pipeline / "unet")
    assert len(read) == len(set(read)) > 1


def test_hash_follows_weights_and_config_alone(pipeline: Path) -> None:
    unet = pipeline / "unet"
    before = hash_weights(unet)
    (unet / "README.md").write_text("words")
    assert hash_weights(unet) == before
    config = json.loads((unet / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps(config | {"sample_size": 9}))
    changed = hash_weights(unet)
    weights = unet / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert len({before, changed, hash_weights(unet)}) == 3


@pytest.mark.parametrize("ref", ["./nowhere", "../models", "runs/typo", "/no/where", "a/b/c"])
def test_a_mistyped_path_is_no_hub_id(ref: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve_module, "hub_folder", lambda ref: pytest.fail(f"asked for {ref}"))
    with pytest.raises(UsageError, match="neither a registered backbone"):
        resolve(ref)


def test_truncated_weights_are_named(pipeline: Path) -> None:
    weights = pipeline / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="diffusion_pytorch_model.safetensors is damaged"):
        resolve(str(pipeline))


def test_an_unfinished_run_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.run.json").write_text("{}")
    with pytest.raises(DataError, match="has not finished"):
        resolve(str(tmp_path / "run"))
