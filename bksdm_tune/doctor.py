"""``bksdm-tune doctor``: versions, devices, what really loads, caches and disk.

Every probe runs the thing that it reports; whatever the probe raises is the finding.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import platform
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bksdm_tune import __version__
from bksdm_tune.artifacts import cache_root, folder_bytes, versions

OPTIONAL_PACKAGES = ("bitsandbytes", "xformers", "prodigyopt")
OPTIMISER_LIBRARIES = {"AdamW8bit": "bitsandbytes", "Prodigy": "prodigyopt"}
SDPA_BACKENDS = ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")


@dataclass(frozen=True)
class Doctor:
    """Print what a bug report needs: versions, devices, attention backends, caches, disk."""

    json: bool = False
    """Print one JSON object instead of text."""


def probe(name: str, action: Callable[[], Any]) -> dict[str, Any]:
    """``{"name", "works", "reason"}``; the reason is one line, empty if it works."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            action()
        except Exception as error:
            said = [str(error), *(str(warning.message) for warning in caught)]
            lines = [text.strip().splitlines()[0] for text in said if text.strip()]
            reason = "; ".join(dict.fromkeys(lines))
            return {"name": name, "works": False, "reason": f"{type(error).__name__}: {reason}"}
    return {"name": name, "works": True, "reason": ""}


def package_versions() -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "bksdm-tune": __version__,
        **versions(),
    }
    for name in OPTIONAL_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def cpu() -> dict[str, Any]:
    import psutil

    memory = psutil.virtual_memory()
    return {
        "device": "cpu",
        "name": f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} cores",
        "total_bytes": memory.total,
        "free_bytes": memory.available,
    }


def accelerators() -> list[dict[str, Any]]:
    """Each CUDA device, or MPS, as torch sees it."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        found.append(_device(f"cuda:{index}", name, total, free))
    if torch.backends.mps.is_available():
        total = torch.mps.recommended_max_memory()
        found.append(_device("mps", "Metal", total, total - torch.mps.driver_allocated_memory()))
    return found


def _device(device: str, name: str, total: int, free: int) -> dict[str, Any]:
    return {"device": device, "name": name, "total_bytes": total, "free_bytes": free}


def attention(device: str) -> list[dict[str, Any]]:
    """Whether SDPA, each of its kernels, and xformers attend on ``device``."""
    checks = [probe("sdpa", partial(_sdpa, device))]
    checks += [probe(f"sdpa {n.lower()}", partial(_sdpa, device, n)) for n in SDPA_BACKENDS]
    return [*checks, probe("xformers", partial(try_xformers, device))]


def _query(device: str) -> Any:
    """[1, 8, 8, 16]: as many heads as tokens, so SDPA's and xformers' order of axes both fit."""
    import torch

    # The fused CUDA kernels take half precision only.
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    return torch.ones(1, 8, 8, 16, device=device, dtype=dtype)


def _sdpa(device: str, backend: str | None = None) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    query = _query(device)
    chosen = sdpa_kernel(getattr(SDPBackend, backend)) if backend else contextlib.nullcontext()
    with chosen:
        scaled_dot_product_attention(query, query, query).sum().item()


def try_xformers(device: str) -> None:
    """Attend once; raises whatever is wrong with xformers here."""
    operations = importlib.import_module("xformers.ops")
    query = _query(device)
    operations.memory_efficient_attention(query, query, query).sum().item()


def optimisers() -> list[dict[str, Any]]:
    return [
        probe(f"{name} ({library})", partial(importlib.import_module, library))
        for name, library in OPTIMISER_LIBRARIES.items()
    ]


def caches() -> list[dict[str, Any]]:
    from huggingface_hub.constants import HF_HUB_CACHE

    root = cache_root()
    folders = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    folders += [Path(HF_HUB_CACHE)] if Path(HF_HUB_CACHE).is_dir() else []
    return [{"path": str(folder), "bytes": folder_bytes(folder)} for folder in folders]


def disks() -> list[dict[str, Any]]:
    """Free bytes where runs go (the current folder) and where caches go."""
    found = []
    for path in (Path.cwd(), cache_root().absolute()):
        there = next(p for p in (path, *path.parents) if p.exists())
        found.append({"path": str(path), "free_bytes": shutil.disk_usage(there).free})
    return found


def report() -> dict[str, Any]:
    """Everything; keys: versions, devices (the preferred one first), attention,
    optimisers, caches, disks.
    """
    torch_works = probe("torch", partial(importlib.import_module, "torch"))
    devices = [*(accelerators() if torch_works["works"] else []), cpu()]
    return {
        "versions": package_versions(),
        "devices": devices,
        "attention": [torch_works, *attention(devices[0]["device"])],
        "optimisers": optimisers(),
        "caches": caches(),
        "disks": disks(),
    }


def gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def render(facts: dict[str, Any]) -> str:
    sections = {
        "versions": [f"{name} {number}" for name, number in facts["versions"].items()],
        "devices": [
            f"{d['device']}: {d['name']}, {gib(d['free_bytes'])} free of {gib(d['total_bytes'])}"
            for d in facts["devices"]
        ],
        f"attention on {facts['devices'][0]['device']}": _verdicts(facts["attention"]),
        "optimisers": _verdicts(facts["optimisers"]),
        "caches": [f"{c['path']}: {gib(c['bytes'])}" for c in facts["caches"]] or ["none"],
        "disk": [f"{d['path']}: {gib(d['free_bytes'])} free" for d in facts["disks"]],
    }
    return "\n".join(
        f"{title}\n" + "".join(f"  {line}\n" for line in lines) for title, lines in sections.items()
    )


def _verdicts(probes: list[dict[str, Any]]) -> list[str]:
    return [f"{p['name']}: {'works' if p['works'] else 'no, ' + p['reason']}" for p in probes]


def main(argv: list[str]) -> int:
    import tyro

    config = tyro.cli(Doctor, args=argv, prog="bksdm-tune doctor")
    # Some libraries print while they load; standard output is for the report alone.
    with contextlib.redirect_stdout(sys.stderr):
        facts = report()
    print(json.dumps(facts, indent=2) if config.json else render(facts))
    return 0
