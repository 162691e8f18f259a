"""Command lines: recipes, overrides, files, and what a user is told."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import yaml

from hypersd_ray.config.base import CombinationError, ConfigError
from hypersd_ray.config.cli import RECIPE_OPTIONS, parse
from hypersd_ray.config.data import DataConfig
from hypersd_ray.config.tscd import TSCDConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipes(tmp_path):
    def small(batch: int = 8) -> TSCDConfig:
        return TSCDConfig(teacher=str(tmp_path), data=DataConfig(shards="x.tar"), optim={"batch": batch})

    return {"small": small}


def test_a_recipes_argument_and_a_fields_override_both_count(recipes):
    config = parse(recipes, TSCDConfig, "", ["small", "--batch", "16", "--data.shards", "y.tar", "--run.seed", "3"])
    assert (config.optim.batch, config.data.shards, config.run.seed) == (16, "y.tar", 3)


def test_a_saved_config_is_read_back(recipes, tmp_path):
    config = parse(recipes, TSCDConfig, "", ["small", "--distill.omega-max", "5"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert parse(recipes, TSCDConfig, "", ["--config", str(path)]) == config
    with fsspec.open("memory://runs/config.yaml", "wt") as file:
        file.write(path.read_text())
    assert parse(recipes, TSCDConfig, "", ["--config", "memory://runs/config.yaml"]) == config
    with pytest.raises(ConfigError, match=r"--config memory://runs/none\.yaml: ") as caught:
        parse(recipes, TSCDConfig, "", ["--config", "memory://runs/none.yaml"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["small", "--distill.n-list", "41", "40", "40", "40"], "n_list=.*41.*k=8.*40"),
        (["small", "--run.workers", "3"], "optim.batch=8 is not divisible by .* = 3; the nearest accepted is 9"),
        (["small", "--teacher", "/nowhere"], "teacher='/nowhere' is not a folder"),
        (["small", "--adversarial.adv-start", "0.5"], "adversarial weight must rise"),
    ],
)
def test_an_impossible_combination_is_one_line(recipes, arguments, said):
    with pytest.raises(CombinationError, match=said) as caught:
        parse(recipes, TSCDConfig, "", arguments)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_or_field_is_an_error(recipes, tmp_path):
    with pytest.raises(ConfigError, match="unknown recipe 'big': choose one of small"):
        parse(recipes, TSCDConfig, "", ["big"])
    with pytest.raises(ConfigError, match=r"unknown option --optim.learning-rate: there are --optim.lr, "):
        parse(recipes, TSCDConfig, "", ["small", "--optim.learning-rate", "1"])
    (tmp_path / "c.yaml").write_text("teacher: x\nsurprise: 1\n")
    with pytest.raises(ConfigError, match=r"(shards|data|surprise)"):
        parse(recipes, TSCDConfig, "", ["--config", str(tmp_path / "c.yaml")])


def test_the_job_says_one_line_without_a_traceback():
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / "tscd.py", "sd15", "--teacher", "/nowhere"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.strip().splitlines() == [
        "error: teacher='/nowhere' is not a folder: name one in diffusers' layout (model_index.json, unet/, vae/, ...)"
    ]


def test_a_recipes_switch_is_an_option_without_a_value():
    from hypersd_ray.recipes import RECIPES

    plain, kept = (parse(RECIPES, TSCDConfig, "", ["tiny", *more]) for more in ([], ["--keep-cfg"]))
    assert not plain.distill.keeps_guidance and kept.distill.keeps_guidance
    assert (kept.distill.k_list, kept.distill.steps_list) == ((8,), (sum(plain.distill.steps_list),))
    assert kept.run.name == "tiny-minutes-keep-cfg"


def test_help_explains_each_option_of_each_recipe():
    from hypersd_ray import recipes

    found = [getattr(recipes, name) for name in recipes.__all__ if name.endswith("RECIPES")]
    assert len(found) == 5
    names = {p for family in found for recipe in family.values() for p in inspect.signature(recipe).parameters}
    assert names - set(RECIPE_OPTIONS) == set()


@pytest.mark.parametrize("job", sorted((ROOT / "jobs").glob("*.py")), ids=lambda p: p.stem)
def test_examples_are_indented(job):
    """--help joins lines that are not: a command could not be read there, nor copied."""
    lines = (ast.get_docstring(ast.parse(job.read_text()), clean=False) or "").splitlines()
    assert [line for line in lines if line.startswith(("python ", "ray "))] == []
