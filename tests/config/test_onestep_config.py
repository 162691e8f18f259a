"""What a one-step configuration refuses, and what it fills in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hypersd_ray.config.base import CombinationError
from hypersd_ray.config.cli import parse
from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.recipes import FEEDBACK_RECIPES, ONESTEP_RECIPES, RECIPES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def init(tmp_path) -> str:
    (tmp_path / "lora.safetensors").touch()
    return str(tmp_path / "lora.safetensors")


def of(init: str, *arguments: str) -> OneStepConfig:
    return parse(ONESTEP_RECIPES, OneStepConfig, "", ["tiny", "--init", init, *arguments])


def test_the_mode_decides_the_networks_input_and_the_share(init):
    assert (of(init).t_input, of(init).share) == (1000, 0.25)
    dedicated = of(init, "--mode", "dedicated")
    assert (dedicated.t_input, dedicated.share) == (801, 0.0)
    own = of(init, "--mode", "dedicated", "--timestep", "700", "--consistency-share", "0.1")
    assert (own.t_input, own.share) == (701, 0.1)


def test_every_path_that_workers_read_is_located(init):
    moved = of(init, "--regression.pairs", "pairs").located(lambda path: f"/there/{path}")
    assert (moved.init, moved.regression.pairs) == (f"/there/{init}", "/there/pairs")
    assert moved.teacher.startswith("/there/") and of(init).located(str).regression.pairs is None


def test_feedback_is_a_flag_and_its_files_are_located(init):
    assert of(init).models == () and of(init).placement.where == "actors"
    config = of(init, "--feedback", "--feedback.weight", "0.5").located(lambda path: f"/there/{path}")
    assert config.feedback.weight == 0.5 and [r.name for r in config.models] == ["aesthetic_v2", "image_reward"]
    assert config.models[0].tower.startswith("/there/") and config.models[0].tokenizer == ""
    alone = of(init, "--feedback", "--dmd.weight", "0")  # trains the single step by itself
    assert alone.dmd.weight == 0


def test_a_full_unet_learns_slower_than_a_lora(init):
    lora, full, faster = of(init), of(init, "--full-unet"), of(init, "--full-unet", "--optim.lr", "1e-4")
    assert full.full_unet and not lora.full_unet
    assert full.optim.lr < lora.optim.lr / 10 and full.dmd.fake_lr < lora.dmd.fake_lr / 10
    assert (faster.optim.lr, faster.dmd.fake_lr) == (1e-4, full.dmd.fake_lr)


def test_weights_of_the_only_stage_may_be_named_at_both_ends(init):
    adversarial = of(init, "--adversarial.adv-start", "0.02", "--adversarial.adv-end", "0.02").adversarial
    assert adversarial.weights(0, 1).adversarial == 0.02


@pytest.mark.parametrize("rows", range(2, 65))
def test_parts_that_are_accepted_meet_the_share(rows, init):
    for share in (0.1, 0.25, 0.5, 0.9):
        config = of(init, "--consistency-share", str(share), "--optim.batch", "128")
        if rows >= config.fewest_rows:
            assert 1 / 1.5 <= config.consistency_rows(rows) / rows / share <= 1.5


@pytest.mark.parametrize(("recipe", "workers"), [("sd15", 8), ("sdxl", 32)])
def test_published_recipes_train_as_the_method_says(recipe, workers, init, tmp_path):
    unified = ONESTEP_RECIPES[recipe](str(tmp_path), init)
    rows = unified.optim.batch // (workers * unified.optim.accumulation)
    assert unified.consistency_rows(rows) / rows == 0.25
    full = ONESTEP_RECIPES[recipe](str(tmp_path), init, full_unet=True)
    few = [ONESTEP_RECIPES[f"few-{recipe}"](str(tmp_path), method=method) for method in ("turbo", "dmd")]
    assert [c.optim.lr for c in (unified, *few, full)] == [5e-5, 5e-5, 5e-5, 5e-7]  # DMD2's, of a LoRA and a UNet
    assert {c.optim.clip for c in (unified, *few, full)} == {10.0}
    assert FEEDBACK_RECIPES[recipe](str(tmp_path), init, "models").optim.lr == 1e-5  # ReFL's
    assert RECIPES[recipe](str(tmp_path)).optim.lr == 1e-6  # the paper's


@pytest.mark.parametrize("recipe", ["sd15", "sdxl"])
def test_the_recipes_are_whole(recipe, init, tmp_path):
    arguments = [
        recipe,
        "--init",
        init,
        "--teacher",
        str(tmp_path),
        "--data.shards",
        "x.tar",
        "--dmd.fake-updates",
        "7",
    ]
    config = parse(ONESTEP_RECIPES, OneStepConfig, "", arguments)
    assert config.distill.k_list == (1,) and config.dmd.fake_updates == 7
    assert OneStepConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("recipe", ["tiny", "sd15", "sdxl"])
def test_the_recipes_take_pairs(recipe, init, tmp_path):
    teacher = [] if recipe == "tiny" else ["--teacher", str(tmp_path)]
    arguments = [recipe, "--init", init, *teacher, "--mode", "dedicated", "--regression.pairs", "pairs"]
    assert parse(ONESTEP_RECIPES, OneStepConfig, "", arguments).regression.pairs == "pairs"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--init", "/nowhere.safetensors"], r"init='/nowhere\.safetensors' is not a file: name the LoRA"),
        (["--timestep", "800"], "timestep=800 with mode='unified'.*mode='dedicated'"),
        (["--distill.k-list", "2"], r"k_list=\(2,\): one-step enhancement goes on at k = 1"),
        (["--dmd.low", "0.5", "--dmd.high", "0.4"], r"dmd\.high=0\.4 is not above dmd\.low=0\.5"),
        (["--dmd.weight", "0"], r"dmd\.weight=0 without regression\.pairs"),
        (["--optim.batch", "1"], "leaves 1 row to a part, consistency_share=0.25 needs at least 3"),
        (["--optim.accumulation", "16"], r"batch=32 leaves 2 rows to a part, .* needs at least 3: .*accumulation=16"),
        (["--consistency-share", "0.01"], r"leaves 32 rows to a part, consistency_share=0\.01 needs at least 67"),
        (["--distill.empty-prompts", "0.1"], r"distill\.empty_prompts=0\.1: .* set distill\.empty_prompts=0"),
        (
            ["--adversarial.adv-start", "0.01", "--adversarial.adv-end", "0.02"],
            r"adv_start=0\.01: there is one stage, whose weights are adversarial\.adv_end=0\.02",
        ),
        (["--adversarial.mse-start", "2"], r"adversarial\.mse_start=2\.0: .*adversarial\.mse_end=1\.0: set those"),
        (["--adversarial.shape", "2"], r"adversarial\.shape=2\.0: there is one stage"),
        (
            ["--regression.pairs", "x", "--regression.batch", "3", "--run.workers", "2"],
            r"regression\.batch=3 is not divis",
        ),
        (["--zero.stage", "2"], r"zero\.stage=2 without full_unet: .* it needs no ZeRO; leave zero\.stage out or set"),
        (["--full-unet", "--zero.offload"], r"zero\.offload needs zero\.stage=1, 2 or 3"),
        (["--full-unet", "--zero.stage", "2", "--zero.teacher"], r"zero\.teacher needs zero\.stage=3, it is 2"),
    ],
)
def test_an_impossible_combination_is_one_line(arguments, said, init):
    with pytest.raises(CombinationError, match=said) as caught:
        of(init, *arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny"], "--init"),
        (["tiny", "--init", "/no"], "error: init='/no'"),
        (["sdxl", "--plan"], "error: --plan without --full-unet: a LoRA's moments are small"),
        (["sdxl", "--full-unet", "--plan", "--gpus", "0"], "error: --gpus 0 --gpu-memory 80: both must be above 0"),
        (["sdxl", "--full-unet", "--plan", "--gpus", "7"], "error: optim.batch=512 is not divisible"),
    ],
)
def test_the_job_says_so_without_a_traceback(arguments, said):
    job = [sys.executable, ROOT / "jobs" / "onestep.py", *arguments]
    done = subprocess.run(job, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr
