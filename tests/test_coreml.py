"""ML programs are checked by what stands in the packages; running them takes a Mac."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bksdm_tune.cli import main
from bksdm_tune.errors import DataError
from bksdm_tune.files import coreml_format
from bksdm_tune.files.answers import question
from bksdm_tune.pipeline import load_part
from bksdm_tune.resolve import resolve
from tiny import make_pipeline


@pytest.mark.parametrize("v2", [False, True])
def test_split_attention_is_the_same_attention(tmp_path: Path, monkeypatch: Any, v2: bool) -> None:
    """Here with chunks smaller than the number of queries."""
    monkeypatch.setattr(coreml_format, "CHUNK", 10)
    unet = load_part(resolve(str(make_pipeline(tmp_path / "one", size="small", v2=v2))), "unet")
    noisy, timesteps = question(unet.config)
    embeds = torch.randn(len(noisy), 7, unet.config.cross_attention_dim)
    with torch.no_grad():
        plain = unet(noisy, timesteps, embeds).sample
        split = coreml_format.Unet(unet)(noisy, timesteps, embeds.transpose(1, 2).unsqueeze(2))
    torch.testing.assert_close(split, plain, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What ``export --format coreml`` made of a backbone, and what it said."""
    from contextlib import redirect_stdout
    from io import StringIO

    folder = tmp_path_factory.mktemp("coreml")
    said = StringIO()
    with redirect_stdout(said):
        words = ["export", "pocket-tiny", "--format", "coreml", "--out", str(folder / "out")]
        assert main(words) == 0
    return folder / "out", said.getvalue()


def test_the_packages(exported: tuple[Path, str]) -> None:
    import coremltools

    out, said = exported
    assert {path.name for path in out.iterdir()} == {
        "Unet.mlpackage", "TextEncoder.mlpackage", "VAEDecoder.mlpackage", "vocab.json",
        "merges.txt",
    }  # fmt: skip
    assert "not executed" in said and "U-Net: " in said and "6-bit palettes: " in said
    spec = coremltools.utils.load_spec(str(out / "Unet.mlpackage"))
    assert [i.name for i in spec.description.input] == [
        "sample", "timestep", "encoder_hidden_states"
    ]  # fmt: skip
    kinds = [operation.type for operation in coreml_format.operations(spec)]
    assert kinds.count("constexpr_lut_to_dense") > 20
    assert "scaled_dot_product_attention" not in kinds


def test_a_decoded_weight_is_the_palettised_one(exported: tuple[Path, str]) -> None:
    import coremltools

    out, _ = exported
    package = out / "Unet.mlpackage"
    weights = coreml_format.decoded(coremltools.utils.load_spec(str(package)), package)
    unet = load_part(resolve("pocket-tiny"), "unet")
    key = "up_blocks.1.attentions.0.proj_in.weight"
    own, found = unet.state_dict()[key], weights["model_" + key.replace(".", "_")]
    assert found.unique().numel() <= 64
    assert float((own - found).norm() / own.norm()) < 0.05


def test_foreign_weights_are_refused() -> None:
    unet = coreml_format.Unet(load_part(resolve("pocket-tiny"), "unet"))
    with pytest.raises(DataError, match="was not exported"):
        coreml_format.put_weights("Unet", unet, {"model_elsewhere": torch.zeros(5)})
    with pytest.raises(DataError, match="was not exported"):
        coreml_format.put_weights("Unet", unet, {"model_conv_in_weight": torch.zeros(5)})
