"""What turns pictures and captions into features; each says which weights and pixels it used.

Offline everything runs on the two pocket encoders, which know the illustrated world only.  Their
names say so, and names are part of a result's protocol.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from bksdm_tune.artifacts import content_key, sha256_file
from bksdm_tune.diffusion import tokenise
from bksdm_tune.errors import DataError, UsageError
from bksdm_tune.pocket import encoder as pocket_folder
from bksdm_tune.resolve import HUB_ID, read_json
from subjects.photos import open_photo

POCKET_SIDE = 64
BESIDE = ("config.json", "tokenizer*.json", "vocab.json", "merges.txt")
PUBLISHED_SIDE, PUBLISHED_SHORT = 224, 256  # DINO's own evaluation: resize, then centre crop
FIXED_SIDE = ("vit",)  # of transformers; others stretch their position embeddings


@dataclass(frozen=True)
class Encoder:
    """``images``: uint8 NHWC tensor of one batch -> float32 (N, width); ``texts`` where it has a
    text side; ``classes``: -> probabilities (N, classes), where it classifies.

    ``prepare`` makes a picture the uint8 HWC array that ``images`` takes.
    """

    name: str
    weights: str
    """Hash of the weights."""
    preprocessing: str
    prepare: Callable[[Image.Image], NDArray[np.uint8]]
    images: Callable[[Tensor], Tensor]
    texts: Callable[[list[str]], Tensor] | None = None
    classes: Callable[[Tensor], Tensor] | None = None

    @property
    def facts(self) -> dict[str, str]:
        return {"name": self.name, "weights": self.weights, "preprocessing": self.preprocessing}


def resized(side: int, way: Image.Resampling) -> Callable[[Image.Image], NDArray[np.uint8]]:
    """Squash to ``side`` x ``side``, in PIL."""

    def prepare(image: Image.Image) -> NDArray[np.uint8]:
        return np.array(image.convert("RGB").resize((side, side), way))

    return prepare


def centred(side: int, resize: int) -> Callable[[Image.Image], NDArray[np.uint8]]:
    """Short side to ``resize`` (bicubic), centre crop of ``side``, in PIL; the long side rounded
    down and the margin to even, as DINO's and CLIP's own evaluations have it (torchvision)."""

    def prepare(image: Image.Image) -> NDArray[np.uint8]:
        width, height = image.size
        short = min(width, height)
        size = (int(resize * width / short), int(resize * height / short))
        image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        left, top = (round((length - side) / 2) for length in size)
        return np.array(image.crop((left, top, left + side, top + side)))

    return prepare


def hash_folder(folder: Path) -> str:
    """Of the weights and of what decides how they are used."""
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if not weights:
        raise DataError(f"{folder} has no weights.")
    beside = [path for name in BESIDE for path in folder.glob(name)]
    return content_key({path.name: sha256_file(path) for path in sorted({*weights, *beside})})


def hash_state(model: torch.nn.Module) -> str:
    """Of a loaded model's tensors, where no file is known."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def _normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 NHWC -> float32 NCHW."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    centre, spread = (pixels.new_tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    return (pixels - centre) / spread


HALF = (0.5, 0.5, 0.5)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pocket_looks(device: str) -> Encoder:
    from transformers import ResNetModel

    folder = pocket_folder("looks")
    model = ResNetModel.from_pretrained(folder).float().eval().to(device)

    def images(batch: Tensor) -> Tensor:
        features = model(_normalised(batch, HALF, HALF)).pooler_output.flatten(1)
        return F.normalize(features, dim=1)

    prepare = resized(POCKET_SIDE, Image.Resampling.BICUBIC)
    return Encoder("pocket-looks", hash_folder(folder), "squash 64 bicubic", prepare, images)


def pocket_clip(device: str) -> Encoder:
    prepare = resized(POCKET_SIDE, Image.Resampling.BICUBIC)
    folder = pocket_folder("clip")
    return _clip_model(folder, "pocket-clip", "squash 64 bicubic", prepare, (HALF, HALF), device)


def clip_folder(folder: Path, device: str) -> Encoder:
    """A CLIP of transformers with its tokenizer; pixels as CLIP wants them.

    Raises:
        DataError: the folder holds none.
    """
    side = _side(folder, "vision_config")
    way, norms = centred(side, side), (CLIP_MEAN, CLIP_STD)
    text = f"short side {side} bicubic, centre crop"
    return _clip_model(folder, folder.name, text, way, norms, device)


def _clip_model(
    folder: Path,
    name: str,
    preprocessing: str,
    prepare: Callable[[Image.Image], NDArray[np.uint8]],
    norms: tuple[tuple[float, ...], tuple[float, ...]],
    device: str,
) -> Encoder:
    from transformers import AutoTokenizer, CLIPModel

    try:
        model = _whole(CLIPModel, folder).to(device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        clip_texts(model, tokenizer, ["a dog"])
    except Exception as error:
        raise DataError(
            f"{folder} cannot be loaded as a CLIP with its tokenizer: {error}"
        ) from None
    tokenizer.model_max_length = model.config.text_config.max_position_embeddings
    return Encoder(
        name,
        hash_folder(folder),
        preprocessing,
        prepare,
        lambda batch: clip_images(model, _normalised(batch, *norms)),
        lambda texts: clip_texts(model, tokenizer, texts),
    )


def _whole(kind: Any, folder: Path) -> Any:
    """A model with all weights that count, in float32.

    Raises:
        ValueError: some would be random numbers; transformers only warns.
    """
    model, told = kind.from_pretrained(folder, output_loading_info=True)
    lacking = sorted(key for key in told["missing_keys"] if "pooler" not in key)
    if lacking:
        raise ValueError(f"its weights lack {', '.join(lacking[:3])}, {len(lacking)} in all")
    return model.float().eval()


def _side(folder: Path, part: str | None = None) -> int:
    """Side in pixels of the pictures that a vision model's config.json asks for."""
    config = read_json(folder / "config.json")
    config = config.get(part, {}) if part else config
    side = config.get("image_size", PUBLISHED_SIDE)
    if not isinstance(side, int):
        raise DataError(f"{folder / 'config.json'}: image_size is {side!r}, not one integer.")
    return side


def clip_images(model: Any, pixels: Tensor) -> Tensor:
    """Unit image embeddings; the same calls in transformers 4 and 5."""
    pooled = model.vision_model(pixel_values=pixels).pooler_output
    return F.normalize(model.visual_projection(pooled), dim=1)


def clip_texts(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    ids = tokenise(tokenizer, texts).to(model.device)
    pooled = model.text_model(input_ids=ids).pooler_output
    return F.normalize(model.text_projection(pooled), dim=1)


def open_clip_encoder(name: str, pretrained: str, device: str) -> Encoder:
    """``ViT-g-14`` with ``laion2b_s34b_b88k`` is the published one; ``pretrained`` may be a file.

    Raises:
        DataError: the weights are neither on disk nor to be had.
    """
    import open_clip

    try:
        model, _, _ = open_clip.create_model_and_transforms(name, pretrained=pretrained)
    except Exception as error:
        raise DataError(
            f"open_clip {name} ({pretrained}) cannot be loaded: {error}. Without a network, name a "
            "local one (evaluate: --clip-weights FILE, score: --clip FOLDER) or use the pocket "
            "encoders (--extractors pocket, --protocol pocket)."
        ) from None
    model = model.eval().to(device)
    tokenizer = open_clip.get_tokenizer(name)
    side = model.visual.image_size
    side = side[0] if isinstance(side, tuple) else side
    weights = sha256_file(Path(pretrained)) if Path(pretrained).is_file() else hash_state(model)
    return Encoder(
        f"open_clip/{name}",
        weights,
        f"short side {side} bicubic, centre crop",
        centred(side, side),
        lambda batch: F.normalize(
            model.encode_image(_normalised(batch, CLIP_MEAN, CLIP_STD)), dim=1
        ),
        lambda texts: F.normalize(model.encode_text(tokenizer(texts).to(device)), dim=1),
    )


def inception(weights: Path | None, device: str) -> Encoder:
    """Inception-v3 of the FID (TensorFlow's weights of 2015), through torch-fidelity.

    Raises:
        UsageError: torch-fidelity is not installed.
        DataError: the weights cannot be had.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise UsageError(
            "Inception features need torch-fidelity. Type: pip install 'bksdm-tune[scores]'"
        ) from None
    try:
        model = FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=None if weights is None else str(weights),
        )
    except Exception as error:
        raise DataError(
            f"The Inception weights cannot be loaded: {error}. Without a network, give their file "
            "with --inception-weights, or score with --extractors pocket."
        ) from None
    model = model.eval().to(device)

    def both(batch: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = model(batch.permute(0, 3, 1, 2).contiguous())
        return features, logits.softmax(1)

    return Encoder(
        "inception-v3-compat",
        "2015-12-05" if weights is None else sha256_file(weights),
        "squash 256 bicubic, then 299 bilinear as in TensorFlow 1 (torch-fidelity)",
        resized(256, Image.Resampling.BICUBIC),
        lambda batch: both(batch)[0],
        classes=lambda batch: both(batch)[1],
    )


def dino(source: str, device: str) -> Encoder:
    """DINO or DINOv2, class token, from a local transformers folder or a Hub id (``id@revision``).

    The paper's pixels whatever the model was trained at, 256 and 224; a model that takes no other
    side than its own gets that, in the same proportion.

    Raises:
        DataError: it is not there, or no vision model.
    """
    from transformers import AutoModel

    folder = Path(source) if Path(source).is_dir() else _hub_model(source)
    fixed = read_json(folder / "config.json").get("model_type") in FIXED_SIDE
    side = _side(folder) if fixed else PUBLISHED_SIDE
    short = side * PUBLISHED_SHORT // PUBLISHED_SIDE
    try:
        model = _whole(AutoModel, folder).to(device)
        first_token(model, torch.zeros(1, 3, side, side, device=device))
    except Exception as error:
        raise DataError(f"{source} cannot be loaded as a vision model: {error}") from None
    return Encoder(
        folder.name if Path(source).is_dir() else source,
        hash_folder(folder),
        f"short side {short} bicubic, centre crop {side}",
        centred(side, short),
        lambda batch: first_token(model, _normalised(batch, IMAGENET_MEAN, IMAGENET_STD)),
    )


@torch.inference_mode()
def first_token(model: Any, pixels: Tensor) -> Tensor:
    """The class token's features (N, width)."""
    tokens: Tensor = model(pixel_values=pixels).last_hidden_state
    return tokens[:, 0]


def dino_here(source: str) -> bool:
    """Whether a Hub id, with its @revision, is on this disk."""
    name, _, revision = source.partition("@")
    return _cached(name, allow_patterns=["config.json"], revision=revision or None) is not None


def open_clip_here(name: str, pretrained: str) -> bool:
    """Whether the published weights are on this disk."""
    import open_clip

    repository = open_clip.get_pretrained_cfg(name, pretrained).get("hf_hub", "").rstrip("/")
    return bool(repository) and _cached(repository) is not None


def _cached(name: str, **wanted: Any) -> Path | None:
    """The snapshot in the Hub cache, without network."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, **wanted, local_files_only=True))
    except OSError:
        return None


def _hub_model(source: str) -> Path:
    """Raises DataError: it is neither in the Hub cache nor to be had."""
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    if not HUB_ID.fullmatch(name):
        raise DataError(f"{source} cannot be loaded: it is no folder and no Hub id (user/name).")
    wanted: dict[str, Any] = {
        "allow_patterns": ["config.json", "*.safetensors"],
        "revision": revision or None,
    }
    if (here := _cached(name, **wanted)) is not None:
        return here
    print(f"Downloading {name} from the Hugging Face Hub.", file=sys.stderr)
    try:
        return Path(snapshot_download(name, **wanted))
    except Exception as error:  # whichever HTTP library the Hub client uses raises its own
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{name} is not on this disk and cannot be downloaded: {reason}") from None


@torch.inference_mode()
def encode(
    apply: Callable[[Tensor], Tensor],
    encoder: Encoder,
    pictures: list[Path],
    device: str,
    batch_size: int = 32,
) -> NDArray[np.float32]:
    """Features (N, width) of picture files, in order.

    Raises:
        DataError: a file is no picture, or only a part of one.
    """
    parts = []
    for start in range(0, len(pictures), batch_size):
        images = [open_photo(path) for path in pictures[start : start + batch_size]]
        parts.append(features(apply, encoder, images, device))
    return np.concatenate(parts)


@torch.inference_mode()
def features(
    apply: Callable[[Tensor], Tensor], encoder: Encoder, images: list[Image.Image], device: str
) -> NDArray[np.float32]:
    """Features (N, width) of one batch of pictures, in float32 on a GPU too."""
    batch = torch.from_numpy(np.stack([encoder.prepare(image) for image in images]))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return apply(batch.to(device)).float().cpu().numpy()
