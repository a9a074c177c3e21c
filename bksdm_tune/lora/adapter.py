"""An adapter in one form, whatever its file called things: a layer's path -> its low-rank update.

Paths are those of transformers 4 and diffusers: ``unet.down_blocks.0...to_q``,
``text_encoder.text_model.encoder.layers.0.self_attn.q_proj``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bksdm_tune.errors import DataError, UsageError
from bksdm_tune.provenance import Provenance

UNET, TEXT = "unet", "text_encoder"


@dataclass(frozen=True)
class Update:
    """A layer's update by factors.

    ``kind``: lora (``down``, ``up``, for some convolutions ``mid``), loha (``w1_a`` ... ``w2_b``,
    ``t1``, ``t2``; Hyeon-Woo et al. 2022), lokr (``w1`` or its factors, ``w2`` or its factors,
    ``t2``; LyCORIS).  ``magnitude`` makes it a DoRA.  ``alpha`` None stands for the rank.
    """

    kind: str
    factors: dict[str, Tensor]
    alpha: float | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        f = self.factors
        if self.kind == "lora":
            return len(f["down"])
        if self.kind == "loha":
            return int(f["w1_b"].shape[0])
        first = next((f[name] for name in ("w1_b", "w2_b") if name in f), None)
        return max(f["w2"].shape[:2]) if first is None else len(first)

    @property
    def scale(self) -> float:
        if self.kind == "lokr" and "w1" in self.factors and "w2" in self.factors:
            return 1.0  # nothing is low-rank, and LyCORIS then leaves alpha out
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of ``delta``, without computing it."""
        empty = {name: value.to("meta") for name, value in self.factors.items()}
        return tuple(Update(self.kind, empty, self.alpha).delta().shape)

    def delta(self) -> Tensor:
        """The change of the weight, float32; (out, in), or (out, in, k, k) for a convolution."""
        f = {name: value.float() for name, value in self.factors.items()}
        return self.scale * {"lora": _lora, "loha": _loha, "lokr": _lokr}[self.kind](f)

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """``weight`` with the update in it, float32, in its shape."""
        base = weight.float()
        changed = base + strength * self.delta().reshape(base.shape)
        if self.magnitude is None:
            return changed
        # Liu et al. 2024, equation 5: the direction is changed, the magnitude is learned.  LyCORIS
        # keeps it along the inputs, as (1, in, ...), others along the outputs.
        wanted = self.magnitude.float()
        along_inputs = wanted.ndim > 1 and len(wanted) == 1 and wanted.numel() > 1
        dims = [d for d in range(changed.ndim) if d != int(along_inputs)]
        norm = torch.linalg.vector_norm(changed, dim=dims, keepdim=True)
        if wanted.numel() != norm.numel():
            raise DataError("has a DoRA magnitude that does not fit its layer.")
        whole = changed * (wanted.reshape(norm.shape) / norm)
        return whole if strength == 1 else base + strength * (whole - base)


def _lora(f: dict[str, Tensor]) -> Tensor:
    down, up = f["down"], f["up"]
    if "mid" in f:  # a convolution between two 1 x 1 ones (LoCon's cp decomposition)
        return torch.einsum("or,rskl,si->oikl", up.flatten(1), f["mid"], down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def _loha(f: dict[str, Tensor]) -> Tensor:
    if "t1" in f:
        parts = [
            torch.einsum("ijkl,jr,ip->prkl", f[f"t{n}"], f[f"w{n}_b"], f[f"w{n}_a"]) for n in (1, 2)
        ]
        return parts[0] * parts[1]
    return (f["w1_a"] @ f["w1_b"]) * (f["w2_a"] @ f["w2_b"])


def _lokr(f: dict[str, Tensor]) -> Tensor:
    first = f["w1"] if "w1" in f else f["w1_a"] @ f["w1_b"]
    if "t2" in f:
        second = torch.einsum("ijkl,ip,jr->prkl", f["t2"], f["w2_a"], f["w2_b"])
    else:
        second = f["w2"] if "w2" in f else f["w2_a"] @ f["w2_b"].flatten(1)
    if second.ndim == 4:
        first = first[:, :, None, None]
    return torch.kron(first, second)


@dataclass(frozen=True)
class Adapter:
    """Updates of the layers of a U-Net and, if trained, its text encoder."""

    updates: dict[str, Update]
    layout: str
    """What the file was in: diffusers, diffusers-old, peft, kohya."""
    metadata: dict[str, str] = field(default_factory=dict)
    made_from: Provenance | None = None
    """This program's record in the metadata."""

    def of(self, part: str) -> dict[str, Update]:
        """Updates of one part, by path within it."""
        prefix = f"{part}."
        return {k.removeprefix(prefix): u for k, u in self.updates.items() if k.startswith(prefix)}

    @property
    def kinds(self) -> list[str]:
        return sorted({u.kind + ("+dora" if u.magnitude is not None else "") for u in
                       self.updates.values()})  # fmt: skip

    @property
    def trigger(self) -> str | None:
        """The words that call what was learned, where the file says them."""
        ours = self.made_from.trigger if self.made_from else ""
        return ours or self.metadata.get("modelspec.trigger_phrase") or None

    @property
    def plain(self) -> bool:
        """Only what every reader knows: linear or convolutional LoRA."""
        return self.kinds == ["lora"] and not any(
            "mid" in update.factors for update in self.updates.values()
        )

    def with_alpha(self, alpha: float | None) -> Adapter:
        """Plain LoRAs that change the same with that alpha everywhere (None: each its rank), the
        rest of their scales in ``up``."""
        updates = {}
        for path, update in self.updates.items():
            factor = update.scale * update.rank / (update.rank if alpha is None else alpha)
            up = update.factors["up"]
            scaled = up if factor == 1 else factor * up.float()
            updates[path] = replace(update, factors=update.factors | {"up": scaled}, alpha=alpha)
        return replace(self, updates=updates)

    def with_rank(self, rank: int) -> Adapter:
        """Plain LoRAs of a smaller rank, whose alpha is their rank, filled up with zeros."""
        updates = {}
        for path, update in self.updates.items():
            assert update.alpha is None
            down, up, more = update.factors["down"], update.factors["up"], rank - update.rank
            rows = down.new_zeros(more, *down.shape[1:])
            columns = up.new_zeros(len(up), more, *up.shape[2:])
            filled = {"down": torch.cat([down, rows]), "up": torch.cat([up, columns], 1)}
            updates[path] = replace(update, factors=filled)
        return replace(self, updates=updates)

    @property
    def largest_rank(self) -> int:
        return max(update.rank for update in self.updates.values())

    @property
    def common_alpha(self) -> float:
        """Of most layers that change something."""
        alphas = [u.rank if u.alpha is None else u.alpha for u in self.updates.values()]
        alphas = [alpha for alpha in alphas if alpha] or [1.0]
        return float(max(set(alphas), key=alphas.count))

    def check_plain(self, what: str) -> None:
        if not self.plain:
            raise UsageError(
                f"{what} is for plain LoRAs; this file holds {', '.join(self.kinds)}. Fold it into "
                "a backbone with `bksdm-tune export --format merged`."
            )


def merge(adapters: list[Adapter], weights: list[float]) -> Adapter:
    """Their weighted sum as one LoRA, exactly: the factors side by side, at the sum of the ranks.

    Raises:
        UsageError: one is no plain LoRA.
    """
    for adapter in adapters:
        adapter.check_plain("merge")
    paths = dict.fromkeys(path for adapter in adapters for path in adapter.updates)
    updates = {}
    for path in paths:
        parts = [(a.updates[path], w) for a, w in zip(adapters, weights, strict=True)
                 if path in a.updates]  # fmt: skip
        down = torch.cat([update.factors["down"].float() for update, _ in parts])
        up = torch.cat([w * u.scale * u.factors["up"].float() for u, w in parts], dim=1)
        updates[path] = Update("lora", {"down": down, "up": up}, float(len(down)))
    return Adapter(updates, "diffusers")


def resized(update: Update, rank: int) -> tuple[Update, float]:
    """The best LoRA of that rank (Eckart and Young 1936), and the share of the squared norm that it
    keeps; alpha is its rank."""
    delta = update.delta()
    u, s, v = torch.linalg.svd(delta.flatten(1).double(), full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    up, down = (u[:, :kept] * root).float(), (root[:, None] * v[:kept]).float()
    if delta.ndim == 4:
        up, down = up[:, :, None, None], down.reshape(kept, *delta.shape[1:])
    total = float(s.square().sum())
    energy = float(s[:kept].square().sum()) / total if total else 1.0
    return Update("lora", {"down": down, "up": up}, float(kept)), energy


def resize(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """Every layer at that rank, and the share of the squared norm that is kept."""
    if any(update.magnitude is not None for update in adapter.updates.values()):
        raise UsageError("A DoRA cannot be resized: its change depends on the backbone's weights.")
    updates, kept, total = {}, 0.0, 0.0
    for path, update in adapter.updates.items():
        norm = float(update.delta().square().sum())
        updates[path], energy = resized(update, rank)
        kept, total = kept + energy * norm, total + norm
    share = kept / total if total else 1.0
    return Adapter(updates, "diffusers"), share


def facts(adapter: Adapter) -> dict[str, Any]:
    """Ranks, alphas and targets, for people."""
    ranks = sorted({update.rank for update in adapter.updates.values()})
    alphas = sorted({u.alpha if u.alpha is not None else u.rank for u in adapter.updates.values()})
    ends = sorted({_target(path) for path in adapter.updates})
    return {
        "layout": adapter.layout,
        "kinds": adapter.kinds,
        "unet_layers": len(adapter.of(UNET)),
        "text_encoder_layers": len(adapter.of(TEXT)),
        "ranks": ranks,
        "alphas": alphas,
        "targets": ends,
        "parameters": sum(t.numel() for u in adapter.updates.values() for t in u.factors.values()),
    }


def _target(path: str) -> str:
    """As it is named to PEFT: to_q, to_out.0, ff.net.2."""
    if ".ff." in path:
        return path[path.index(".ff.") + 1 :]
    parts = path.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
