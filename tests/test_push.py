"""Uploading a run to a local stand-in of the Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bksdm_tune.artifacts import verify_manifest
from bksdm_tune.cli import main
from hub import Hub
from tiny import make_pipeline

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    backbone = make_pipeline(folder / "base", size="base")
    words = ["--subject", "dog", "--lora", "--backbone", str(backbone), "--steps", "2"]
    assert main(["dreambooth", *words, "--preview-images", "1", "--out", str(folder / "run")]) == 0
    few = ["--protocol", "pocket", "--prompts", "1", "--images", "1", "--class-images", "1"]
    assert main(["score", str(folder / "run"), *few]) == 0
    return folder / "run"


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


def push(hub: Hub, run: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the client reads its endpoint when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    words = [sys.executable, "-m", "bksdm_tune", "push", str(run), *flags]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)


def test_a_run_arrives_whole(hub: Hub, run: Path, tmp_path: Path) -> None:
    done = push(hub, run, "--repo", "me/dog", "--private")
    assert done.returncode == 0, done.stderr
    files = hub.repos["me/dog"]
    assert hub.private["me/dog"] and f"{hub.url}/me/dog/commit/abc" in done.stdout
    assert files[LORA] == (run / LORA).read_bytes()
    assert {"README.md", "manifest.json", "config.toml", "contact-sheet.png"} <= files.keys()
    assert not any(name.startswith(("samples", "score", "checkpoint")) for name in files)
    card = files["README.md"].decode()
    assert card.startswith("---\n") and "## Scores" in card and "| dino | " in card
    assert "rank, alpha" in card and "| LoRA targets | " in card and card.count("- text: ") == 3
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    verify_manifest(tmp_path)  # whoever downloads it can check what came
    assert "base_model:" in card and 'instance_prompt: "a sks11df dog"' in card


def test_a_dry_run_sends_nothing(hub: Hub, run: Path) -> None:
    done = push(hub, run, "--repo", "me/dog", "--dry-run")
    assert done.returncode == 0 and LORA in done.stdout and "Nothing was sent" in done.stdout
    assert hub.repos == {}


def test_a_refusal_is_one_clear_message(hub: Hub, run: Path) -> None:
    hub.refuse = True
    done = push(hub, run, "--repo", "me/dog")
    assert done.returncode == 3 and "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr and "hf_test" not in done.stderr


@pytest.mark.parametrize("repo", ["dog", "me/my/dog", "me dog/x"])
def test_repository_names(run: Path, repo: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["push", str(run), "--repo", repo])
    assert ended.value.code == 2 and "user/name" in capsys.readouterr().err


def test_only_finished_runs(tmp_path: Path, capsys: Any) -> None:
    assert main(["push", str(tmp_path), "--repo", "me/dog"]) == 3
    assert "not a finished folder" in capsys.readouterr().err
