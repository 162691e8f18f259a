"""The comparison's recipes: equal budgets, and what settings cannot be combined."""

from __future__ import annotations

import pytest

from hypersd_ray.config.base import CombinationError, ConfigError
from hypersd_ray.config.cli import parse
from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.embedded import paths
from hypersd_ray.recipes import METHODS, ONESTEP_RECIPES, RECIPES
from hypersd_ray.recipes.ablations import ABLATIONS
from hypersd_ray.recipes.compare import COMPARE_RECIPES, TRAININGS
from hypersd_ray.recipes.methods import BUDGET, FEEDBACK_SHARE, teacher_passes
from hypersd_ray.recipes.onestep import onestep_tiny
from hypersd_ray.recipes.trajectory import TRAJECTORIES, shared

LORA = str(paths.LORAS / "tscd-k1.safetensors")


def parts(method: str, **arguments):
    """Every configuration of a chain."""
    chain = TRAININGS[method](**arguments)
    return [chain.first, *(link.config(LORA) for link in chain.then)]


def images(config) -> int:
    """Those that the teacher sees."""
    return 0 if isinstance(config, FeedbackConfig) else config.optim.batch * sum(config.stage_steps)


@pytest.mark.parametrize("method", TRAININGS)
def test_every_method_has_the_same_budget(method):
    for budget in (BUDGET, 32 * 777):
        configs = parts(method, budget=budget, lr=3e-4, seed=7)
        assert sum(map(images, configs)) == budget
        assert len({c.run.name for c in configs}) == len(configs)
    assert configs[0].optim.lr == 3e-4
    assert {c.run.seed for c in configs} == {7}
    assert all(type(c).model_validate(c.model_dump(mode="json")) == c for c in configs)  # whole, not only copied
    with pytest.raises(ConfigError, match="raise the budget"):
        METHODS["lightning"](budget=32 * 8)


def test_runs_of_a_sweep_have_names_of_their_own():
    names = {TRAININGS[m](lr=lr, seed=s).first.run.name for m in TRAININGS for lr in (1e-3, 3e-4) for s in (0, 1)}
    assert len(names) == 4 * (len(TRAININGS) - 2), "two chains begin as another does"


def test_chains_that_begin_alike_share_the_run():
    assert METHODS["tscd-feedback"]().first == METHODS["tscd"]().first
    assert METHODS["tscd-dmd"]().first == METHODS["hyper-sd"]().first != METHODS["tscd"]().first
    runs = [c for m in METHODS for c in parts(m)]
    assert len({c.run.name for c in runs}) == len({c.model_dump_json() for c in runs}) == len(runs) - 2


def test_a_chain_goes_on_from_what_was_made():
    tscd, *feedback, dmd = parts("hyper-sd", lr=1e-3)
    chain = METHODS["hyper-sd"](lr=1e-3)
    assert all(isinstance(one, FeedbackConfig) for one in feedback) and isinstance(dmd, OneStepConfig)
    assert [(link.above, link.steps) for link in chain.then] == [(0, 8), (0, 4), (0, 2), (0, 1), (4, 1)]
    assert [one.refl.steps for one in feedback] == [(8,), (4,), (2,), (1,)], "each for its own number of steps"
    assert chain.serves == {8: 1, 4: 2, 2: 3, 1: 5} and METHODS["tscd-feedback"]().serves == {8: 1, 4: 2, 2: 3, 1: 4}
    assert all(one.tscd == LORA for one in feedback) and dmd.init == LORA
    assert dmd.lora.rank == tscd.lora.rank + feedback[-1].lora.rank  # the merge of the two
    assert dmd.mode == "dedicated", "the single step has a model of its own"
    unified = parts("tscd-dmd", lr=3e-3)[1]
    assert unified.mode == "unified" and unified.lora.rank == tscd.lora.rank
    assert feedback[0].optim.lr == pytest.approx(2e-4) and unified.optim.lr == pytest.approx(6e-4)
    assert parts("hyper-sd", lr=3e-3)[-1].optim == dmd.optim == onestep_tiny(LORA, "dedicated").optim
    assert sum(one.steps for one in feedback) == pytest.approx(FEEDBACK_SHARE * BUDGET / 32, abs=1)
    assert images(dmd) == pytest.approx(BUDGET / 5, abs=32)


def test_how_often_the_teacher_is_asked():
    steps = BUDGET // 32
    assert teacher_passes(METHODS["lcm"]().first) == BUDGET
    assert teacher_passes(METHODS["perflow"]().first) == 8 * BUDGET
    assert teacher_passes(METHODS["pd"]().first) == 2 * BUDGET
    lightning = METHODS["lightning"]().first
    first, *rest = lightning.distill.steps_list
    assert teacher_passes(lightning) == 32 * (4 * (first + sum(rest[:2])) + 2 * sum(rest[2:])) < 4 * BUDGET
    assert teacher_passes(METHODS["turbo"]().first) == 32 * steps


@pytest.mark.parametrize("method", TRAJECTORIES)
@pytest.mark.parametrize("recipe", ["tiny", "sd15", "sdxl"])
def test_a_method_is_a_setting_of_every_base(recipe, method, tmp_path):
    teacher = [] if recipe == "tiny" else ["--teacher", str(tmp_path)]
    config = parse(RECIPES, TSCDConfig, "", [recipe, *teacher, "--method", method])
    assert config.distill.name == method
    assert (method in config.run.name) == (method != "tscd")
    assert TSCDConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("method", ["tscd", "lcm", "tcd", "perflow"])
def test_guidance_can_be_kept(method):
    config = parse(RECIPES, TSCDConfig, "", ["tiny", "--method", method, "--keep-cfg"])
    assert config.distill.keeps_guidance and config.stages == 1
    assert config.distill.k_list == ({"tscd": 8, "perflow": 4}.get(method, 1),)
    assert TSCDConfig.model_validate(config.model_dump(mode="json")) == config
    with pytest.raises(ConfigError, match="keep_cfg with method lightning"):
        parse(RECIPES, TSCDConfig, "", ["tiny", "--method", "lightning", "--keep-cfg"])


@pytest.mark.parametrize("method", ["turbo", "dmd"])
@pytest.mark.parametrize("recipe", ["few-tiny", "few-sd15", "few-sdxl"])
def test_few_step_models_start_from_every_base(recipe, method, tmp_path):
    teacher = [] if recipe == "few-tiny" else ["--teacher", str(tmp_path)]
    config = parse(ONESTEP_RECIPES, OneStepConfig, "", [recipe, *teacher, "--method", method])
    assert config.init is None and config.starts == (1000, 750, 500, 250) and config.share == 0
    assert config.run.name.endswith(method if teacher else f"{method}-minutes")
    assert OneStepConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("steps", [3, 4, 10, 1001])
def test_shares_sum_up(steps):
    assert sum(shared(steps, (5, 1, 1))) == steps and min(shared(steps, (5, 1, 1))) >= 1
    assert shared(700, (5, 1, 1)) == pytest.approx((500, 100, 100), abs=2)


TRAJECTORY_MISTAKES = [
    (["--distill.k-list", "2", "4", "2", "1"], r"k_list=\(2, 4, 2, 1\) must not rise"),
    (["--distill.t-end", "two_steps"], r"t_end='two_steps' with distill.target='ema'.*set target='teacher'"),
    (["--distill.path", "straight"], r"path='straight' with distill.start='grid'.*set start='edges'"),
    (
        ["--distill.path", "straight", "--distill.start", "edges"],
        r"with distill.t_end='uniform'.*set t_end='segment_start'",
    ),
    (["--adversarial.conditional", "True", "False"], r"conditional has 2 entries, distill\.k_list 4 stages"),
    (["--method", "perflow", "--adversarial.adv-end", "0.1"], r"adv_end=0\.1 with distill\.path='straight'"),
]
SCORE_MISTAKES = [
    (["--timesteps"], r"timesteps=\(\) with mode='few'"),
    (["--timesteps", "249", "999"], r"timesteps=\(249, 999\) with mode='few'.*falling within 999\.\.0"),
    (["--timesteps", "1000", "1"], r"falling within 999\.\.0"),
    (["--timestep", "800"], r"timestep=800 with mode='few'"),
    (["--mode", "dedicated"], r"timesteps=\(999, 749, 499, 249\) with mode='dedicated'"),
    (["--dmd.fake-updates", "2"], r"dmd\.fake_updates=2 with dmd\.measure='add'.*set dmd\.fake_updates=0"),
    (["--adversarial.conditional", "True"], r"adversarial\.conditional: here"),
    (["--regression.pairs", "x"], r"regression\.pairs with mode='few'"),
]


@pytest.mark.parametrize(("recipe", "arguments", "said"), [
    *(("tiny", *mistake) for mistake in TRAJECTORY_MISTAKES), *(("few-tiny", *mistake) for mistake in SCORE_MISTAKES),
])  # fmt: skip
def test_an_impossible_combination_is_one_line(recipe, arguments, said):
    recipes, kind = (RECIPES, TSCDConfig) if recipe == "tiny" else (ONESTEP_RECIPES, OneStepConfig)
    with pytest.raises(CombinationError, match=said) as caught:
        parse(recipes, kind, "", [recipe, *arguments])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_its_part_alone(name):
    ours, plain = TRAININGS[name]().first, TRAININGS["tscd"]().first
    differ = {
        f"{section}.{field}"
        for section in ("distill", "adversarial", "optim", "lora", "data")
        for field, value in getattr(plain, section)
        if getattr(getattr(ours, section), field) != value
    }
    allowed = {
        # A short stage warms up for a shorter time, one long stage as long as any training.
        "tscd-one-stage": {"distill.k_list", "distill.n_list", "distill.steps_list", "optim.warmup"},
        "tscd-base": {"distill.teacher"},
        "tscd-segment-start": {"distill.t_end"},
        "tscd-perturbed": {"distill.perturbation"},
    }
    found = {one for one in differ if not one.startswith("adversarial.")} if name not in allowed else differ
    assert found == allowed.get(name, set())
    assert name in allowed or "adversarial.adv_end" in differ
    assert name in COMPARE_RECIPES["ablations"]().methods
