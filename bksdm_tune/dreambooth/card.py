"""The README.md of a run: what it is, how to use it, how it was made, under which licence."""

from __future__ import annotations

import json
from typing import Any

from bksdm_tune.backbones import EMBEDDED
from bksdm_tune.dreambooth.config import Config
from bksdm_tune.dreambooth.job import Job
from bksdm_tune.pipeline_folder import licence_of

LORA_USAGE = """\
pipe = StableDiffusionPipeline.from_pretrained("{base}")
pipe.load_lora_weights("THIS FOLDER")"""
WIDGETS = ("a {} in the snow", "a {} on the beach", "a {} with a city in the background")
FULL_USAGE = 'pipe = StableDiffusionPipeline.from_pretrained("THIS FOLDER")'

CARD = """\
---
license: {licence_id}
library_name: diffusers
pipeline_tag: text-to-image
base_model: {quoted_base}
instance_prompt: {quoted_instance}
tags: [dreambooth, bk-sdm, {method}]
widget:
{widgets}
---
# {trigger}: DreamBooth ({method}) on {backbone}

![Photos, and the same prompts and seeds before and after tuning](contact-sheet.png)

Write `{trigger}` where the subject should be. With this program:

    bksdm-tune generate THIS-FOLDER --prompt "a {{subject}} in the snow" --n 4 --seed 0

With diffusers (`bksdm-tune backbones` says where an embedded backbone lies):

```python
from diffusers import StableDiffusionPipeline
{usage}
picture = pipe("{widget}").images[0]
```

The backbone is {backbone}: {shape}. {adapter_note}

## How it was made

| | |
|---|---|
| photos | {photos} |
| instance prompt, class prompt | {instance}; {class_prompt} |
| steps, batch, learning rate, seed | {steps}, {batch}, {rate:g}, {seed} |
{lora}| prior preservation | {prior}, weight {weight:g} |
| text encoder | {text} |
| trained parameters | {parameters:,} |
| seconds, peak memory | {seconds:.0f} s{share}, {memory:.2f} GB |

{selection}`config.toml` reproduces it:
`bksdm-tune dreambooth --config config.toml --out NEW-FOLDER`.

## Licence

Licence: {licence}.

{notice}
"""


def card(job: Job, results: dict[str, Any]) -> str:
    config = job.config
    licence_id, licence, notice = licence_of(job.parts)
    row = job.parts.backbone
    embedded = row is not None and row.source == EMBEDDED
    base = job.parts.name if row is None or embedded else row.source
    usage = (
        LORA_USAGE.format(base=f"FOLDER OF {base}" if embedded else base)
        if config.model.lora
        else FULL_USAGE
    )
    note = "An adapter for one architecture lands in wrong layers on another; use it on this one."
    return CARD.format(
        licence_id=licence_id,
        licence=licence,
        notice=notice,
        base=base,
        quoted_base=json.dumps(base),  # a JSON text is a YAML text, whatever is in it
        quoted_instance=json.dumps(job.instance_prompt),
        widgets="\n".join(
            "- text: " + json.dumps(template.format(job.trigger)) for template in WIDGETS
        ),
        usage=usage,
        method=job.method,
        trigger=job.trigger,
        backbone=job.parts.name,
        shape=results["shape"],
        adapter_note=note if config.model.lora else "",
        instance=job.instance_prompt,
        class_prompt=job.class_prompt,
        widget=WIDGETS[0].format(job.trigger),
        photos=f"{len(job.photos.photos)}: {job.photo_source}",
        seed=config.training.seed,
        lora=lora_rows(config),
        steps=config.training.steps,
        batch=config.training.batch_size,
        rate=config.training.learning_rate,
        prior=config.prior.prior,
        weight=config.prior.prior_weight,
        text="trained" if config.training.train_text_encoder else "frozen",
        parameters=results["trained_parameters"],
        seconds=results["seconds"],
        share=share_of(results["trained_together"]),
        selection=selection_of(results["selection"]),
        memory=results["peak_memory_gb"],
    )


def lora_rows(config: Config) -> str:
    """Rank, alpha and targets as lines of the table; '' for full tuning."""
    lora, text = config.lora, config.training.train_text_encoder
    if not config.model.lora:
        return ""
    rows = [f"| LoRA rank, alpha, dropout | {lora.rank}, {lora.alpha:g}, {lora.dropout:g} |",
            f"| LoRA targets | {' '.join(lora.targets or ())} |"]  # fmt: skip
    if text:
        rank, alpha = lora.text_encoder_rank, lora.text_encoder_alpha
        rows.append(f"| the same in the text encoder | {rank}, {alpha:g} |")
    return "".join(f"{row}\n" for row in rows)


def share_of(together: int) -> str:
    return f" (a share of {together} subjects trained together)" if together > 1 else ""


def selection_of(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return (
        f"Step {found['delivered']} of {found['taken']} taken is what is here; the best of the "
        f"scored steps was {found['best']} (`scores.jsonl`).\n\n"
        "![DINO against CLIP-T](scores.png)\n\n"
    )
