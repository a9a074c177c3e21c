"""``doctor`` reports what really loads on this machine."""

from __future__ import annotations

import json
import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bksdm_tune import doctor
from bksdm_tune.artifacts import cache_root


@pytest.fixture
def facts(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    (own_cache / "latents").mkdir(parents=True)
    (own_cache / "latents" / "a").write_bytes(b"x" * 1000)
    assert doctor.main(["--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_report_has_every_section(facts: dict[str, Any]) -> None:
    assert set(facts) == {"versions", "devices", "attention", "optimisers", "caches", "disks"}
    assert facts["versions"]["torch"] == version("torch")
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert len(facts["disks"]) == 2
    assert all(disk["free_bytes"] > 0 for disk in facts["disks"])


def test_the_cpu_is_a_device_with_memory(facts: dict[str, Any]) -> None:
    cpu = facts["devices"][-1]
    assert cpu["device"] == "cpu"
    assert f"{os.cpu_count()} cores" in cpu["name"]
    assert 0 < cpu["free_bytes"] <= cpu["total_bytes"]


def test_attention_names_each_backend_and_plain_sdpa_works(facts: dict[str, Any]) -> None:
    verdicts = {check["name"]: check for check in facts["attention"]}
    assert len(verdicts) == 7
    assert verdicts["sdpa"] == {"name": "sdpa", "works": True, "reason": ""}
    for check in facts["attention"] + facts["optimisers"]:
        assert check["works"] == (check["reason"] == "")
        assert "\n" not in check["reason"]


def test_caches_have_sizes(facts: dict[str, Any]) -> None:
    sizes = {cache["path"]: cache["bytes"] for cache in facts["caches"]}
    assert sizes[str(cache_root() / "latents")] == 1000


def test_the_text_shows_every_fact_of_the_report(facts: dict[str, Any]) -> None:
    shown = doctor.render(facts)
    for text in (f"torch {version('torch')}", "cpu: ", "  sdpa: works", "latents: 0.00 GiB"):
        assert text in shown


def test_a_library_that_does_not_load_gives_its_reason_in_one_line() -> None:
    def action() -> None:
        warnings.warn("kernel needs sm80", stacklevel=1)
        raise RuntimeError("no kernel\nat frame 3")

    assert doctor.probe("x", action) == {
        "name": "x",
        "works": False,
        "reason": "RuntimeError: no kernel; kernel needs sm80",
    }


def test_an_xformers_that_imports_but_cannot_attend_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def attend(query: Any, key: Any, value: Any) -> None:
        raise NotImplementedError(f"no operator for {tuple(query.shape)}")

    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace())
    monkeypatch.setitem(
        sys.modules, "xformers.ops", SimpleNamespace(memory_efficient_attention=attend)
    )
    check = doctor.attention("cpu")[-1]
    assert check["name"] == "xformers"
    assert check["reason"] == "NotImplementedError: no operator for (1, 8, 8, 16)"


def test_a_torch_that_does_not_load_leaves_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # as a failed import does
    facts = doctor.report()
    assert [device["device"] for device in facts["devices"]] == ["cpu"]
    assert not facts["attention"][0]["works"]
    assert "torch" in facts["attention"][0]["reason"]


def test_links_are_not_counted_twice(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"x" * 5000)
    (tmp_path / "link").symlink_to(tmp_path / "blob")
    assert 5000 <= doctor.folder_bytes(tmp_path) < 6000
