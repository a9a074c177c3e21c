"""The README.md of a distilled backbone."""

from __future__ import annotations

from typing import Any

from bksdm_tune.pipeline_folder import licence_of
from distill.job import Job

CARD = """\
---
license: {licence_id}
library_name: diffusers
pipeline_tag: text-to-image
base_model: {teacher}
tags: [bk-sdm, distillation]
---
# BK-SDM {size} student of {teacher}

{shape}, {parameters:,} U-Net parameters. Block removal and distillation after BK-SDM
(arXiv 2305.15798); every part beside the U-Net is a copy of the teacher's.

```python
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained("THIS FOLDER")
```

Personalise it: `bksdm-tune dreambooth --backbone THIS-FOLDER --subject dog --lora`.

## How it was made

| | |
|---|---|
| start | {init} |
| data | {data}, {resolution} px, centre crop, flip {flip}; {skipped} rows skipped |
| steps, pictures a step | {steps:,}, {pictures} |
| learning rate, schedule | {rate:g}, {schedule} |
| lambda task / output / feature | {lambdas} |
| features | {features} |
| caption dropout, offset noise, min-SNR gamma | {dropout:g}, {offset:g}, {gamma} |
| delivered weights | {weights} |
| losses, mean of the last steps | {losses} |
| seconds, processes, peak memory | {seconds:.0f} s, {processes}, {memory:.2f} GB |

`config.toml` reproduces it: `bksdm-tune distill --config config.toml --out NEW-FOLDER`.
Its pictures are scored (FID, IS, KID, CMMD, CLIP score) by
`bksdm-tune evaluate THIS-FOLDER --captions metadata.csv --real REAL --out SCORES`.

## Licence

Licence of {teacher}: {licence}.

{notice}
"""


def card(job: Job, results: dict[str, Any]) -> str:
    """Markdown with the header that the Hub reads."""
    config = job.config
    licence_id, stated, notice = licence_of(job.parts)
    loss, training = config.loss, config.training
    layers = [student for _, student in job.pairs] if loss.lambda_feat else []
    return CARD.format(
        licence_id=licence_id,
        licence=stated,
        notice=notice,
        teacher=job.parts.name,
        size=config.models.size,
        shape=results["shape"],
        parameters=results["unet_parameters"],
        init="the teacher's weights" if config.models.init == "inherit" else "random weights",
        data=f"`{config.data.data}`",
        resolution=job.resolution,
        skipped=results["rows_skipped"],
        flip="on" if loss.flip else "off",
        steps=results["steps"],
        pictures=results["pictures_a_step"],
        rate=training.learning_rate,
        schedule=training.lr_scheduler,
        lambdas=f"{loss.lambda_task:g} / {loss.lambda_out:g} / {loss.lambda_feat:g}",
        features=", ".join(layers) or "none",
        dropout=loss.caption_dropout,
        offset=loss.offset_noise,
        gamma=loss.min_snr_gamma or "none",
        weights=f"moving average, decay {training.ema:g}" if training.ema else "the last ones",
        losses=", ".join(f"{name} {value:.4g}" for name, value in results["losses"].items()),
        seconds=results["seconds"],
        processes=results["processes"],
        memory=results["peak_memory_gb"],
    )
