"""What a person fills in, as the words of the command line that does it."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from bksdm_tune.app.library import LONGEST, slug
from bksdm_tune.backbones import get_backbone
from bksdm_tune.config import check_positive, check_range
from bksdm_tune.dreambooth.config import Prior
from bksdm_tune.dreambooth.recipes import recipe, recipe_name
from bksdm_tune.errors import UsageError

Method = Literal["lora", "full"]
KINDS = {"str": str, "int": int, "float": float, "bool": bool}
NOUN = re.compile(r"[^\W_][\w' -]{0,59}")
WORD = re.compile(r"[A-Za-z0-9]{2,20}")
MOST_STEPS, LARGEST_RANK, LARGEST_BATCH, LARGEST_SIDE = 20_000, 256, 64, 2048
PREVIEWS = 4  # on the way
# Of a drawing.
MOST_PICTURES, MOST_DENOISING, MOST_GUIDANCE, MOST_STRENGTH = 16, 150, 50, 2


@dataclass(frozen=True)
class Form:
    """A training.  None means: what the recipe says."""

    title: str
    class_noun: str
    backbone: str
    method: Method = "lora"
    steps: int | None = None
    learning_rate: float | None = None
    rank: int | None = None
    batch_size: int | None = None
    resolution: int | None = None
    prior: Prior | None = None
    train_text_encoder: bool | None = None
    identifier: str = "sks11df"
    seed: int = 1234

    def __post_init__(self) -> None:
        check_types(self)
        slug(self.title)
        if len(self.title) > LONGEST:
            raise UsageError(f"A name has at most {LONGEST} characters.")
        if not NOUN.fullmatch(self.class_noun.strip()):
            raise UsageError("Say what it is in a word or two of letters: dog, stuffed animal.")
        get_backbone(self.backbone)
        if self.method not in get_args(Method):
            raise UsageError(f"The method is {' or '.join(get_args(Method))}.")
        if self.prior is not None and self.prior not in get_args(Prior):
            raise UsageError(f"The prior is one of {', '.join(get_args(Prior))}.")
        if not WORD.fullmatch(self.identifier):
            raise UsageError("The identifier is a rare word of 2 to 20 letters and digits.")
        check_range("Steps", self.steps, 1, MOST_STEPS)
        check_positive("Learning rate", self.learning_rate)
        check_range("Rank", self.rank, 1, LARGEST_RANK)
        check_range("Batch size", self.batch_size, 1, LARGEST_BATCH)
        check_range("Resolution", self.resolution, 16, LARGEST_SIDE)
        check_range("Seed", self.seed, 0, 2**62)

    @property
    def pixels(self) -> int:
        """Side of the training pictures."""
        return self.resolution or native_pixels(self.backbone)

    @property
    def length(self) -> int:
        """Steps."""
        return int(self.steps or recipe_of(self.backbone, self.method)["steps"])

    def words(self, photos: Path, out: Path) -> tuple[str, ...]:
        """Of the command line, behind ``bksdm-tune``."""
        said = ["dreambooth", "--photos", str(photos), "--class-noun", self.class_noun.strip()]
        said += ["--name", slug(self.title), "--backbone", self.backbone]
        said += ["--lora"] if self.method == "lora" else []
        said += ["--identifier", self.identifier, "--seed", str(self.seed)]
        options = ("steps", "learning_rate", "batch_size", "resolution", "prior")
        for name in (*options, *(["rank"] if self.method == "lora" else [])):
            value = getattr(self, name)
            said += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        if self.train_text_encoder is not None:
            said += ["--train-text-encoder", str(self.train_text_encoder).lower()]
        said += ["--preview-every", str(max(1, -(-self.length // PREVIEWS)))]
        return (*said, "--checkpoint-every", str(max(1, self.length // 10)), "--out", str(out))


def native_pixels(backbone: str) -> int:
    return get_backbone(backbone).resolution


def recipe_of(backbone: str, method: str) -> dict[str, Any]:
    """What unset fields stand for."""
    return recipe(recipe_name("default", native_pixels(backbone)), method)


def check_types(request: Any) -> None:
    """Values from outside are what the dataclass says; whole floats count as integers.

    Raises:
        UsageError: naming the field.
    """
    for field in fields(request):
        value, kind = getattr(request, field.name), str(field.type)
        if value is None and "None" in kind:
            continue
        wanted = KINDS.get(kind.partition(" | ")[0], str)
        if wanted is int and isinstance(value, float) and value.is_integer():
            value = int(value)
            object.__setattr__(request, field.name, value)
        right = isinstance(value, (int, float) if wanted is float else wanted)
        if not right or isinstance(value, bool) and wanted is not bool or _endless(value):
            name = field.name.replace("_", " ").capitalize()
            raise UsageError(f"{name} is not right: {str(value)[:40]!r}.")


def _endless(value: Any) -> bool:
    """Integers that do not fit a float cannot even be compared with one."""
    return isinstance(value, int) and abs(value) > 2**63
