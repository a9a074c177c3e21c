"""The wheel holds the three packages and their data, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"bksdm_tune", "distill", "subjects"}
FILES = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel built from a copy, so that no stale ``build/`` can leak into it."""
    source = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "tests", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (built,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(built).namelist()


def test_the_top_level_is_exactly_the_three_packages(wheel: list[str]) -> None:
    top = {name.split("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES
    assert len(top) == len(PACKAGES) + 1


def test_every_module_and_data_file_is_in_the_wheel(wheel: list[str]) -> None:
    kept = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert len(kept) > 20
    assert kept - set(wheel) == set()


def test_the_wheel_is_typed_and_licensed(wheel: list[str]) -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(wheel)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)


def test_the_import_contract_names_every_module_of_the_tuning_layer() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = " | ".join(tool["contracts"][0]["layers"])
    named = {part.strip(" ()") for part in layers.split("|")}
    modules = {
        f"bksdm_tune.{path.stem}"
        for path in (ROOT / "bksdm_tune").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert len(modules) > 8
    assert modules - {"bksdm_tune.__init__"} - named == set()


def test_the_readme_and_ci_run_the_same_test_command() -> None:
    assert "scripts/test" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("\nscripts/test")
    for script in (".ci/run", "scripts/test"):
        assert os.access(ROOT / script, os.X_OK)
