"""docs/your-model.md: its commands are read by the jobs' own parsers, on 32 GPUs and with what it adds for 8."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from hypersd_ray.config.cli import parse, read_options
from hypersd_ray.config.evaluate import EvaluateConfig
from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.recipes import FEEDBACK_RECIPES, ONESTEP_RECIPES, RECIPES
from hypersd_ray.trainer.pairs import OdePairsConfig
from serve.app import read_settings

ROOT = Path(__file__).parents[2]
PAGE = re.sub(r"\\\n\s*", "", (ROOT / "docs/your-model.md").read_text())
COMMANDS = [c for c in re.findall(r"^ {4}(python jobs/.*)$", PAGE, flags=re.MULTILINE) if "--plan" not in c]
EIGHT = dict(re.findall(r"^\| ([\w ]+) \| `(--.*?)` \| (?:\d+)", PAGE, flags=re.MULTILINE))
JOBS: dict[str, tuple[Any, type, str]] = {
    "jobs/tscd.py": (RECIPES, TSCDConfig, "TSCD"),
    "jobs/feedback.py": (FEEDBACK_RECIPES, FeedbackConfig, "feedback"),
    "jobs/onestep.py": (ONESTEP_RECIPES, OneStepConfig, "one step"),
}


def read(command: str, folder: Path) -> Any:
    """The configuration that a command gives, with files that are there in place of those of a user."""
    (folder / "lora.safetensors").touch()
    words = shlex.split(command)[1:]
    words = [str(folder / "lora.safetensors") if w.startswith("runs/") else w for w in words]
    words = [str(folder) if w == "models/mine" else w for w in words]
    job, arguments = words[0], words[1:]
    if job in JOBS:
        recipes, kind, _ = JOBS[job]
        return parse(recipes, kind, "", arguments)
    if job == "jobs/evaluate.py":
        return read_options(EvaluateConfig, arguments[1:], "")
    if job == "jobs/pairs.py":
        return read_options(OdePairsConfig, arguments, "")
    assert job == "jobs/precompute.py"
    sys.path.insert(0, str(ROOT / "jobs"))
    try:
        return read_options(importlib.import_module("precompute").PrecomputeConfig, arguments, "")
    finally:
        sys.path.remove(str(ROOT / "jobs"))


def test_there_are_commands_of_each_job():
    assert {c.split()[1] for c in COMMANDS} == {*JOBS, "jobs/precompute.py", "jobs/pairs.py", "jobs/evaluate.py"}
    assert set(EIGHT) == {name for _, _, name in JOBS.values()}


@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_read(command, tmp_path):
    config = read(command, tmp_path)
    job = command.split()[1]
    if job not in JOBS:
        return
    few = read(f"{command} {EIGHT[JOBS[job][2]]}", tmp_path)
    assert (config.run.workers, few.run.workers) == (32, 8)
    assert few.optim.batch == config.optim.batch
    parts = [c.optim.batch // (c.run.workers * c.optim.accumulation) for c in (config, few)]
    assert parts[0] == parts[1], "as many images a part"


def test_the_server_is_told_what_it_knows():
    (line,) = re.findall(r"^ {4}serve run serve\.app:build (.*)$", PAGE, flags=re.MULTILINE)
    settings = read_settings(dict(word.split("=", 1) for word in shlex.split(line)))
    assert (settings.model.id, settings.model.device, settings.denoiser.gpus) == ("mine", "cuda", 1)
