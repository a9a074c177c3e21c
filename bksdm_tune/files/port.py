"""LoRAs between Stable Diffusion and its compressed students, by the block plans.

A student's layer was inherited from a layer of the teacher, so an update moves with it under its
other name; updates of layers that the target lacks are dropped, and listed.
"""

from __future__ import annotations

from bksdm_tune.errors import UsageError
from bksdm_tune.lora.adapter import TEXT, UNET, Adapter
from bksdm_tune.lora.fit import ARCHITECTURES, known_shapes, misfits
from bksdm_tune.unet_configs import PLANS, TEACHER_UNETS
from distill.surgery import weight_map

WEIGHT = ".weight"


def layer_map(name: str) -> dict[str, str]:
    """Layer of that architecture's U-Net -> layer of its teacher's, whose copy it began as."""
    unet, plan = ARCHITECTURES[name]
    tensors = weight_map(TEACHER_UNETS[unet], PLANS[plan])
    return {
        own.removesuffix(WEIGHT): theirs.removesuffix(WEIGHT)
        for own, theirs in tensors.items()
        if own.removesuffix(WEIGHT) in known_shapes(name)
    }


def port(adapter: Adapter, source: str, target: str) -> tuple[Adapter, list[str]]:
    """The adapter for ``target``'s layers, and the U-Net layers that have no place there.

    Raises:
        UsageError: the two are of different families, whose layers have other sizes.
    """
    if ARCHITECTURES[source][0] != ARCHITECTURES[target][0]:
        raise UsageError(
            f"{source} and {target} are of different families: their text widths and layers "
            "differ, and no LoRA crosses between them."
        )
    if wrong := misfits(adapter, known_shapes(source)):
        raise UsageError(
            f"The adapter is not for {source}, of which {len(wrong)} layers are not there or of "
            f"another size, such as {wrong[0]}."
        )
    to_teacher = layer_map(source)
    from_teacher = {theirs: own for own, theirs in layer_map(target).items()}
    moved, dropped = {}, []
    for path, update in adapter.of(UNET).items():
        place = from_teacher.get(to_teacher[path])
        if place is None:
            dropped.append(path)
        else:
            moved[f"{UNET}.{place}"] = update
    if not moved:
        raise UsageError(f"None of the adapter's U-Net layers is in {target}.")
    text = {f"{TEXT}.{path}": update for path, update in adapter.of(TEXT).items()}
    return Adapter(dict(sorted((moved | text).items())), "diffusers"), dropped
