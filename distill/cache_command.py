"""``bksdm-tune cache``: the latents of a data set, computed once."""

from __future__ import annotations

from bksdm_tune.artifacts import free_disk
from bksdm_tune.config import parse
from bksdm_tune.resolve import Parts
from distill.config import CacheConfig

FLOAT16 = 2  # bytes


def main(argv: list[str]) -> int:
    config = parse(CacheConfig, argv, "bksdm-tune cache")
    from bksdm_tune.device import best_device
    from bksdm_tune.pipeline_folder import check_resolution, native_resolution
    from distill.cache import Writer
    from distill.data import open_source
    from distill.job import cache_facts, find_teacher
    from distill.learner import load_encoders

    parts = find_teacher(config.teacher, config.base)
    resolution = config.data.resolution or native_resolution(parts)
    check_resolution(resolution, parts)
    data = config.data
    source = open_source(data.data, data.image_column, data.caption_column)
    free = free_disk(config.out)
    cost = disk_cost(source.size, parts, resolution, config.embeds)
    print(f"{cost} {free / 1e9:.0f} GB are free.", flush=True)
    encoders = load_encoders(parts, best_device(), config.embeds)
    facts = cache_facts(parts, resolution, config.embeds, source.facts)
    writer = Writer(
        config.out, source, encoders, resolution, config.batch_size, data.workers, data.max_broken
    )
    totals = writer.run(facts)
    print(
        f"Wrote {config.out}: {totals['rows']:,} pictures and their mirror images; skipped "
        f"{totals['skipped']} broken or without a caption."
    )
    return 0


def disk_cost(rows: int | None, parts: Parts, resolution: int, embeds: bool) -> str:
    """What the cache will need, in words."""
    from bksdm_tune.pipeline_folder import vae_factor
    from bksdm_tune.resolve import read_json, unet_config

    config = unet_config(parts)
    side = resolution // vae_factor(parts)
    one = 2 * config["in_channels"] * side * side * FLOAT16
    if embeds:
        text = read_json(parts.root / "text_encoder/config.json")
        one += text["max_position_embeddings"] * text["hidden_size"] * FLOAT16
    if rows is None:
        return f"The cache needs {one / 1e3:.1f} kB a picture."
    return f"The cache needs {rows * one / 1e9:.2f} GB ({one / 1e3:.1f} kB a picture)."
