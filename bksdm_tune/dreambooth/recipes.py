"""Where unset flags come from: one aligned table.

``full-size`` is the BK-SDM reference recipe with the text encoder frozen; ``bksdm`` the reference
to the letter (nota-ai/BK-SDM's DreamBooth script); ``miniature`` is for backbones of the pocket
family's size, chosen by measurement (docs/dreambooth.md).
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from bksdm_tune.dreambooth.config import Config
from bksdm_tune.errors import UsageError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
TEXT_LINEAR = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

# fmt: off
ROWS: dict[str, tuple[Any, Any, Any]] = {
    #                         bksdm                 full-size             miniature
    "steps":                (800,                  800,                  600),
    "batch_size":           (1,                    1,                    2),
    "learning_rate/lora":   (1e-4,                 1e-4,                 1.5e-3),
    "learning_rate/full":   (1e-6,                 1e-6,                 1e-4),
    "lr_scheduler":         ("constant",           "constant",           "cosine"),
    "train_text_encoder":   (True,                 False,                True),
    "rank":                 (16,                   16,                   16),
    "alpha":                (27.0,                 27.0,                 16.0),
    "text_encoder_rank":    (16,                   16,                   16),
    "text_encoder_alpha":   (17.0,                 17.0,                 16.0),
    "targets":              (("to_q", "to_v"),     ("to_q", "to_v"),     ATTENTION + FEED_FORWARD),
    "text_encoder_targets": (("q_proj", "v_proj"), ("q_proj", "v_proj"), TEXT_LINEAR),
    "prior":                ("images",             "prediction",         "prediction"),
    "prior_weight":         (1.0,                  1.0,                  0.3),
    "class_images":         (200,                  200,                  64),
    "checkpoint_every":     (200,                  200,                  100),
}
# fmt: on
COLUMNS = ("bksdm", "full-size", "miniature")
MINIATURE_PIXELS = 128


def default_backbone(device: str) -> str:
    return "pocket-base" if device == "cpu" else "bk-base"


def recipe_name(asked: str, resolution: int) -> str:
    """``resolution``: the backbone's own, in pixels."""
    if asked == "bksdm":
        return "bksdm"
    return "miniature" if resolution <= MINIATURE_PIXELS else "full-size"


def recipe(name: str, method: str) -> dict[str, Any]:
    """Field name -> value, for ``method`` lora or full."""
    column = COLUMNS.index(name)
    chosen = {}
    for key, cells in ROWS.items():
        field_name, _, only = key.partition("/")
        if only in ("", method):
            chosen[field_name] = cells[column]
    return chosen


def filled(config: Config, name: str, method: str, resolution: int) -> Config:
    """``config`` with every unset flag that the recipe knows set; the resolution falls back on
    the backbone's own, the text encoder's learning rate on the U-Net's.

    Raises:
        UsageError: two learning rates for an optimiser that has one.
    """
    values = recipe(name, method) | {"resolution": resolution}
    if config.training.optimiser == "prodigy":
        values["learning_rate"] = 1.0  # it finds the rate itself; this is a factor of it
    groups: dict[str, Any] = {}
    for group_field in fields(config):
        group = getattr(config, group_field.name)
        unset = [f.name for f in fields(group) if getattr(group, f.name) is None]
        changes = {field_name: values[field_name] for field_name in unset if field_name in values}
        groups[group_field.name] = replace(group, **changes)
    training = groups["training"]
    rate = training.text_encoder_lr or training.learning_rate
    if training.optimiser == "prodigy" and rate != training.learning_rate:
        raise UsageError("--optimiser prodigy has one learning rate; leave out --text-encoder-lr.")
    groups["training"] = replace(training, text_encoder_lr=rate)
    return replace(config, **groups)
