"""The BK-SDM reference's scripts, from a copy in which what today's libraries refuse is mended.

Accelerate moved ``logging_dir``, huggingface_hub dropped
``Repository``, PEFT turned ``LoraModel``'s arguments round and dropped a way to print its config,
and a tracker that is not there (wandb, never used), or a GPU's counter, has become an error.  The
distillation script draws validation pictures at the start of every epoch, whatever it is told; here
it does not, as ours does not.
"""

from __future__ import annotations

import shutil
from pathlib import Path

MENDED = {
    "kd_train_text_to_image.py": (
        ("        logging_dir=logging_dir,\n", ""),
        ("ProjectConfiguration(total", "ProjectConfiguration(logging_dir=logging_dir, total"),
        ('wandb_tracker = accelerator.get_tracker("wandb")', ""),
        ("(args.valid_prompt is not None)", "False"),
    ),
    "dreambooth_finetune.py": (
        ("        logging_dir=logging_dir,\n", "        project_dir=logging_dir,\n"),
        ("import HfFolder, Repository, whoami", "import whoami"),
        ("LoraModel(config, unet)", 'LoraModel(unet, config, "default")'),
        ("LoraModel(config, text_encoder)", 'LoraModel(text_encoder, config, "default")'),
        ("torch.cuda.reset_max_memory_allocated()", "pass"),
        ("unet.get_peft_config_as_dict(inference=True)", "{}"),
        ("text_encoder.get_peft_config_as_dict(inference=True)", "{}"),
    ),
}


def runnable(checkout: Path, name: str, scratch: Path, *more: tuple[str, str]) -> Path:
    """``src/NAME`` of the checkout, mended; ``more``: changes where the sides must agree."""
    source = shutil.copytree(checkout / "src", scratch / "src", dirs_exist_ok=True)
    script: Path = source / name
    text = script.read_text()
    for old, new in (*MENDED[name], *more):
        assert old in text, f"{name} has no {old!r}"
        text = text.replace(old, new)
    script.write_text(text)
    return script
