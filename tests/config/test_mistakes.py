"""What a user gets wrong on a command line ends in one line, before Ray starts, with exit code 2."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import tyro
import yaml
from ray.exceptions import LocalRayletDiedError

from hypersd_ray.config.base import ConfigError, RunError, Strict
from hypersd_ray.config.cli import parse, read_options, run_job
from hypersd_ray.config.evaluate import EvaluateConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.recipes import RECIPES

ROOT = Path(__file__).parents[2]

MISTAKES = {
    "no recipe": ([], "no recipe given: choose one of tiny, sd15, sdxl, or --config FILE"),
    "unknown recipe": (["sd14"], "unknown recipe 'sd14': choose one of tiny, sd15, sdxl, or --config FILE"),
    "recipe's option": (["tiny", "--budget", "x"], "--budget: invalid choice: 'x' (choose from 'minutes', 'full')"),
    "recipe's need": (["sd15"], "the following arguments are required: --teacher"),
    "unknown option": (["tiny", "--lr", "1"], "unknown option --lr: did you mean --adversarial.lr or --optim.lr?"),
    "misspelt option": (["tiny", "--run.worker", "1"], "unknown option --run.worker: did you mean --run.workers"),
    "unknown in a section": (["tiny", "--lora.dropout", "1"], "there are --lora.rank, --lora.alpha; --help lists all"),
    "stray word": (["tiny", "fast"], "unexpected argument 'fast'"),
    "no value": (["tiny", "--run.workers"], "Missing value for argument '--run.workers'"),
    "bad type": (["tiny", "--optim.lr", "fast"], "--optim.lr: could not convert string to float: 'fast'"),
    "bad choice": (
        ["tiny", "--distill.t-end", "now"],
        "'now' for argument '--distill.t-end'. Expected one of ('uniform', 'segment_start', 'previous', 'two_steps')",
    ),
    "limit": (["tiny", "--optim.lr", "-1"], "optim.lr: Input should be greater than 0 (given: -1.0)"),
    "limit, two levels": (["tiny", "--data.encoder.max-size", "0"], "data.encoder.max_size: Input should be greater"),
    "N and k": (
        ["tiny", "--distill.n-list", "41", "40", "40", "40"],
        "distill.n_list=(41, 40, 40, 40): N=41 solver steps is not a multiple of k=8 segments; the nearest N accepted is 40",
    ),
    "batch and workers": (
        ["tiny", "--run.workers", "3"],
        "optim.batch=32 is not divisible by run.workers * optim.accumulation = 3; the nearest accepted is 33",
    ),
    "teacher": (["sd15", "--teacher", "/nowhere"], "teacher='/nowhere' is not a folder: name one in diffusers' layout"),
    "name": (["tiny", "--run.name", ""], "run.name: String should match pattern"),
    "prompts": (["tiny", "--run.prompts"], "run.prompts"),
    "guidance": (["tiny", "--distill.omega-max", "1.5"], "distill.omega_max=1.5 is below distill.omega_min=2.0"),
    "file": (["--config", "/nowhere.yaml"], "--config /nowhere.yaml: "),
    "file and recipe": (["tiny", "--config", "x.yaml"], "both a recipe (tiny) and --config x.yaml: give one"),
}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("columns", ["30", "200"])
def test_a_mistake_is_one_line_whatever_the_terminal(arguments, said, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as stopped:
        run_job(lambda: parse(RECIPES, TSCDConfig, "The job.", arguments))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert not set("╭│╰─") & set(err)
    assert os.environ["COLUMNS"] == columns


def test_a_files_mistakes_are_one_line_too(tmp_path):
    config = parse(RECIPES, TSCDConfig, "", ["tiny"]).model_dump(mode="json")
    path = tmp_path / "c.yaml"
    for change, said in (
        ({"optim": {"lr": -1}}, r"optim\.lr: Input should be greater than 0 \(given: -1\)"),
        ({"optim": {"rate": 1}}, r"optim\.rate: Extra inputs are not permitted \(given: 1\)"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
    ):
        path.write_text(yaml.safe_dump(config | change))
        with pytest.raises(ConfigError, match=said):
            parse(RECIPES, TSCDConfig, "", ["--config", str(path)])
    for text in ("- a\n- b\n", "a: [", ""):
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            parse(RECIPES, TSCDConfig, "", ["--config", str(path)])
        assert "\n" not in str(caught.value)


ALL_HELP = {
    "no recipe": ([], ("tiny, sd15, sdxl",)),
    "recipe": (["tiny"], ("--budget {minutes,full}", "--keep-cfg", "--distill.k-list", "--plan")),
    "recipe without its need": (["sd15"], ("(required)", "the defaults below say: --teacher '.'", "(default: 512)")),
    "wrong value": (["sd15", "--teacher", "/nowhere"], ("cannot be told yet: teacher='/nowhere'", "--distill.k-list")),
}


@pytest.mark.parametrize(("arguments", "said"), ALL_HELP.values(), ids=ALL_HELP)
def test_help_is_no_mistake_and_lists_every_setting(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(RECIPES, TSCDConfig, "The job.", [*arguments, "--help"], "  --plan  of the job")
    assert not stopped.value.code
    told = capsys.readouterr().out
    assert [words for words in said if words not in told] == []


def test_help_shows_the_recipes_defaults_though_what_it_needs_is_missing(tmp_path, capsys):
    told = []
    for needs in ([], ["--teacher", str(tmp_path)]):
        with pytest.raises(SystemExit):
            parse(RECIPES, TSCDConfig, "The job.", ["sdxl", *needs, "--help"])
        told.append(capsys.readouterr().out)
    workers = [re.search(r"--run\.workers INT.*?default: (\d+)", text, re.DOTALL) for text in told]
    assert [found and found[1] for found in workers] == ["32", "32"]


def test_help_on_pools_that_make_and_judge_pictures_says_nothing_of_encoding(capsys):
    with pytest.raises(SystemExit):
        read_options(EvaluateConfig, ["--help"], "The job.")
    told = capsys.readouterr().out
    pools = told[told.index("generators options") :]
    assert "--scorers.batch-size" in pools and not re.search(r"encode[ds]? ", pools.replace("encoded rows", ""))


class _Make(Strict):
    out: str


class _Show(Strict):
    out: str
    rows: int = 3


_Command = Annotated[_Make, tyro.conf.subcommand("make")] | Annotated[_Show, tyro.conf.subcommand("show")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Expected one of {make, show}."),
        (["make", "--outt", "a", "--out", "b"], "unknown option --outt: did you mean --out? --help lists all"),
        (["show", "--out", "a", "--row", "2"], "unknown option --row: did you mean --rows? --help lists all"),
        (["show"], "these options are required: --out"),
    ],
)
def test_mistakes_in_subcommands_are_one_line_too(arguments, said):
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        read_options(_Command, arguments, "The job.")


@pytest.mark.parametrize(
    ("raised", "code"),
    [(ConfigError("a\nb"), 2), (ValueError("a b"), 2), (RunError("a b"), 1)],
)
def test_exit_codes(raised, code, capsys):
    def main():
        raise raised

    with pytest.raises(SystemExit) as stopped:
        run_job(main)
    assert stopped.value.code == code
    assert capsys.readouterr().err == "error: a b\n"


def test_a_cluster_that_dies_is_one_line(capsys):
    def main():
        raise LocalRayletDiedError()

    with pytest.raises(SystemExit) as stopped:
        run_job(main)
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "the same command goes on" in said and "raylet died" in said and said.count("\n") == 1


def test_a_bug_shows_where_it_is():
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_job(main)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A job as a user calls it, where no Ray can start: it would say so in more than one line, and take longer."""
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT, timeout=300,
        env=os.environ | {"RAY_ADDRESS": "127.0.0.1:1"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("jobs/tscd.py", "tiny", "--data.shards", "/nowhere/*.tar"), "data.shards: nothing matches /nowhere/*.tar"),
        (("jobs/tscd.py", "tiny", "--run.loggers", "wandb"), "pip install 'hypersd-ray[wandb]'"),
        (("jobs/precompute.py", "--model", "x", "--out", "y", "--data.shards", "/nowhere"), "/nowhere does not exist"),
        (("jobs/precompute.py", "--model", "x", "--out", "y"), "these options are required: --data.shards"),
        (
            ("jobs/precompute.py", "--model", "x", "--out", "y", "--data.shards", "x", "--outt", "y"),
            "did you mean --out?",
        ),
    ],
    ids=["shards", "logger", "precompute's shards", "precompute's need", "precompute's option"],
)
def test_a_job_that_cannot_run_says_one_line(arguments, said):
    if said.endswith("[wandb]'"):
        pytest.importorskip("ray")
        try:
            import wandb  # noqa: F401

            pytest.skip("wandb is installed here")
        except ImportError:
            pass
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr
