"""The published extractors on random weights of their own architectures, from local files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from bksdm_tune.errors import DataError
from bksdm_tune.evaluate.encoders import dino, encode, inception, open_clip_encoder

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for number, size in enumerate([(40, 30), (30, 40), (300, 300)]):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(paths[-1])
    return paths


def test_open_clip_scores_from_a_local_file(tmp_path: Path, pictures: list[Path]) -> None:
    config, weights = tmp_path / "tiny-clip.json", tmp_path / "weights.safetensors"
    config.write_text(json.dumps(CLIP))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip")
    from safetensors.torch import save_file

    save_file(model.state_dict(), weights)
    encoder = open_clip_encoder("tiny-clip", str(weights), "cpu")
    assert encoder.texts is not None
    features = encode(encoder.images, encoder, pictures, "cpu")
    with torch.inference_mode():
        words = encoder.texts(["a dog", "a cat"]).numpy()
    assert features.shape == (3, 16) and words.shape == (2, 16)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(words, axis=1), 1, atol=1e-6)
    _, _, transform = open_clip.create_model_and_transforms("tiny-clip", pretrained=str(weights))
    with Image.open(pictures[2]) as image, torch.inference_mode():
        theirs = open_clip.create_model("tiny-clip", pretrained=str(weights)).eval()
        expected = theirs.encode_image(transform(image.convert("RGB"))[None], normalize=True)
    np.testing.assert_allclose(features[2:], expected.numpy(), atol=1e-5)


def test_dinov2_gives_the_class_token(tmp_path: Path, pictures: list[Path]) -> None:
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    model.eval().save_pretrained(tmp_path / "dinov2")
    encoder = dino(str(tmp_path / "dinov2"), "cpu")
    features = encode(encoder.images, encoder, pictures, "cpu", batch_size=2)
    assert features.shape == (3, 32) and encoder.name == "dinov2"
    pixels = torch.from_numpy(encoder.prepare(Image.open(pictures[1]))).permute(2, 0, 1)[None] / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    spread = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    with torch.inference_mode():
        expected = model((pixels - mean) / spread).last_hidden_state[:, 0]
    np.testing.assert_allclose(features[1:2], expected.numpy(), atol=1e-5)


def test_inception_from_a_local_file(
    tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    extractor = fidelity.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:  # the architecture without its published weights
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(extractor, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        model = extractor("inception-v3-compat", ["2048"])
    torch.save(model.state_dict(), tmp_path / "inception.pth")
    encoder = inception(tmp_path / "inception.pth", "cpu")
    assert encoder.classes is not None
    features = encode(encoder.images, encoder, pictures[:2], "cpu")
    classes = encode(encoder.classes, encoder, pictures[:2], "cpu")
    assert features.shape == (2, 2048) and classes.shape == (2, 1008)
    np.testing.assert_allclose(classes.sum(1), 1, atol=1e-5)
    (expected,) = model(
        torch.from_numpy(encoder.prepare(Image.open(pictures[0]))[None]).permute(0, 3, 1, 2)
    )
    np.testing.assert_allclose(features[0], expected[0].numpy(), atol=1e-4)


@pytest.mark.parametrize("make", [inception, lambda path, device: dino(str(path), device)])
def test_missing_weights_are_one_data_error(tmp_path: Path, make: object) -> None:
    pytest.importorskip("torch_fidelity")
    with pytest.raises(DataError, match="cannot be loaded"):
        make(tmp_path / "nothing", "cpu")  # type: ignore[operator]
