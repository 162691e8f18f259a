"""What a sweep may draw, what it stands for, and how many trials fit."""

from __future__ import annotations

import importlib.util
import os
import pickle
import random
from pathlib import Path

import pytest
import yaml
from ray import tune

from hypersd_ray.config.base import CombinationError, ConfigError
from hypersd_ray.config.cli import parse
from hypersd_ray.config.sweep import SpaceConfig, SweepConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.recipes import RECIPES, SWEEP_RECIPES
from hypersd_ray.trainer import keeping, run
from hypersd_ray.trainer.kinds.tscd import check
from hypersd_ray.tuning import sweep as sweeps
from hypersd_ray.tuning.space import applied, held, point_of, readable, searched
from hypersd_ray.tuning.sweep import Outcome, Trial, fitting_trials, sweep_folder, trial_run


@pytest.fixture(scope="module")
def sweep() -> SweepConfig:
    return parse(SWEEP_RECIPES, SweepConfig, "", ["tiny"])


def test_every_draw_is_a_run_whose_weights_are_monotone(sweep):
    """As the paper has it: MSE falls over the stages, the adversarial loss rises."""
    space, rng = SpaceConfig(), random.Random(0)
    assert set(searched(space)) == set(SpaceConfig.model_fields) and held(space) == {}
    for _ in range(300):
        point = {n: rng.uniform(*getattr(space, n)) for n in SpaceConfig.model_fields}
        config = applied(sweep.base, point)
        weights = [config.adversarial.weights(i, config.stages) for i in range(config.stages)]
        assert all(a.mse >= b.mse for a, b in zip(weights, weights[1:], strict=False))
        assert all(a.adversarial <= b.adversarial for a, b in zip(weights, weights[1:], strict=False))
        assert 1 <= config.distill.omega_min <= config.distill.omega_max and 0 <= config.distill.ema_decay < 1
    assert weights[-1].adversarial == pytest.approx(point["adv_end"])


def test_the_bases_point_is_the_base(sweep):
    for base in (sweep.base, RECIPES["tiny"]("full")):
        assert applied(base, point_of(base)).model_dump() == base.model_dump()
        assert applied(base, {}).model_dump() == base.model_dump()
    # the tiny recipe has no adversarial loss, and the space begins there
    assert sweep.base.adversarial.adv_end == 0 == SpaceConfig().adv_end[0]
    assert readable(sweep.base, {"lr": 2.0, "omega_width": 0.0})["lr"] == 2 * sweep.base.optim.lr


def test_what_is_held_still_is_not_searched():
    space = SpaceConfig(lr=(1.0, 1.0))
    assert "lr" not in searched(space) and held(space) == {"lr": 1.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mse_end": (0.5, 1.5)}, r"space.mse_end=0.5 1.5: two numbers within 0..1"),
        ({"shape": (0.0, 1.0)}, "space.shape=0 1: two numbers above 0"),
        ({"lr": (2.0, 1.0)}, "space.lr=2 1: .*the lower one first"),
    ],
)
def test_ranges_that_cannot_be(change, said):
    with pytest.raises(CombinationError, match=said):
        SpaceConfig(**change)


def test_a_sweep_needs_a_measure_and_other_prompts_to_confirm(sweep):
    values = sweep.model_dump()
    for change, said in (
        ({"base": values["base"] | {"measure": {}}}, "base.measure.prompts is empty"),
        ({"confirm": sweep.base.measure.prompts[:2]}, "share 2 prompts"),
        ({"base": values["base"] | {"full_unet": True}}, "set base.full_unet=False"),
    ):
        with pytest.raises(CombinationError, match=said):
            SweepConfig.model_validate(values | change)


def test_trials_run_side_by_side_only_as_far_as_all_their_workers_fit(sweep, monkeypatch):
    """1 worker of 1 CPU and a reader of 0.5: two on 4 CPUs; a GPU a worker limits too."""
    monkeypatch.delenv("RAY_AUTOSCALING", raising=False)
    assert fitting_trials(sweep, {"CPU": 4.0}) == 2
    assert fitting_trials(sweep, {"CPU": 1.5}) == 1
    seven = sweep.model_copy(update={"concurrent": 7})
    assert fitting_trials(seven, {"CPU": 10.5}) == 7
    with pytest.raises(ConfigError, match=r"concurrent=7: 2 trials of 1\.5 CPU fit .* set concurrent=2 or less"):
        fitting_trials(seven, {"CPU": 4.0})  # their readers would get no core
    wide = sweep.base.model_copy(update={"run": sweep.base.run.model_copy(update={"workers": 2, "gpus_per_worker": 1})})
    wide = sweep.model_copy(update={"base": wide})
    assert fitting_trials(wide, {"CPU": 64.0, "GPU": 5.0}) == 2
    with pytest.raises(ConfigError, match=r"a trial needs 2 GPU .*the cluster has 1: lower base.run.workers"):
        fitting_trials(wide, {"CPU": 64.0, "GPU": 1.0})
    monkeypatch.setenv("RAY_AUTOSCALING", "1")
    with pytest.raises(ConfigError, match="set concurrent"):
        fitting_trials(sweep, {"CPU": 4.0})
    monkeypatch.setattr(sweeps, "most_there_will_be", lambda: None)
    assert fitting_trials(seven, {"CPU": 4.0}) == 7, "nobody says how many nodes may come"
    monkeypatch.setattr(sweeps, "most_there_will_be", lambda: {"CPU": 9.0})
    with pytest.raises(ConfigError, match=r"concurrent=7: 6 trials of 1\.5 CPU fit .* set concurrent=6 or less"):
        fitting_trials(seven, {"CPU": 1.0})
    assert fitting_trials(seven, {"CPU": 10.5}) == 7


@pytest.mark.parametrize("here", ["", "1"])
def test_a_trial_knows_whether_nodes_may_come_wherever_it_is(sweep, monkeypatch, tmp_path, here):
    """RAY_AUTOSCALING is the head's: the driver's word counts, also against a node's own."""
    monkeypatch.setenv("RAY_AUTOSCALING", "0" if here else "1")  # a worker node's
    seen = []

    def train(*args, **kwargs):
        seen.append(os.environ["RAY_AUTOSCALING"])
        return run.Result(str(tmp_path), {})

    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(
        sweeps, "_StageEnds", lambda sweep: None
    )  # Ray Train's callback is for Ray Tune's sessions only
    sweeps.run_trial({}, sweep.model_dump(mode="json"), 1, None, autoscaling=here)
    assert seen == [here]


def test_trials_have_names_of_their_own_and_share_what_is_made_once(sweep):
    one, other = (trial_run(sweep, {"lr": 1.5}, name) for name in ("trial-a", "trial-b"))
    folder = sweep_folder(sweep)
    assert one.run.out == f"{folder}/trials" and one.run.name != other.run.name
    assert one.data.cache_dir == other.data.cache_dir == f"{folder}/latents"
    assert one.measure.cache == f"{folder}/references"
    assert one.first_stage == f"{folder}/base/tiny-minutes-base/lora/tscd-k8.safetensors"
    cold = trial_run(sweep.model_copy(update={"warm_start": False}), {"lr": 1.5}, "trial-c")
    assert cold.first_stage is None
    assert TSCDConfig.model_validate(cold.model_dump()) == cold


def test_asha_judges_after_every_stage_that_trials_train_but_the_last(sweep):
    for changes, trained in (({}, (2, 3, 4)), ({"reduction": 3.5}, (2, 3, 4)), ({"warm_start": False}, (1, 2, 3, 4))):
        changed = sweep.model_copy(update=changes)
        *ends, last = (sweeps.rung(changed, stage) for stage in trained)
        asha = sweeps.ASHA(changed)
        *milestones, top = sorted(milestone for milestone, _ in asha._brackets[0]._rungs)
        assert milestones == ends, "each of these ends is a rung of its own"
        assert ends[-1] < last < top == sweeps._last_rung(changed), (
            "the last is none: what ends by itself is not killed"
        )


def test_ashas_rungs_outlast_the_sweeps_process(sweep, tmp_path):
    """As Ray Tune restores it: the scheduler as it was before the first result, then each trial with its last result."""
    base = sweep.base.model_copy(update={"run": sweep.base.run.model_copy(update={"out": str(tmp_path)})})
    sweep = sweep.model_copy(update={"base": base, "reduction": 2.0})
    fresh = pickle.dumps(sweeps.ASHA(sweep))

    def restored(heard: dict[str, dict[int, float]]) -> sweeps.ASHA:
        asha = pickle.loads(fresh)
        asha.set_search_properties("objective", "min")
        for name, objectives in heard.items():
            trial = tune.experiment.Trial("run_trial", stub=True, trial_id=name)
            stage = max(objectives, default=None)
            if stage is not None:
                trial.update_last_result({sweeps.RUNG: sweeps.rung(sweep, stage), "objective": objectives[stage]})
            asha.on_trial_add(None, trial)
        return asha

    def decision(asha: sweeps.ASHA, name: str, stage: int, value: float) -> str:
        result = {sweeps.RUNG: sweeps.rung(sweep, stage), "objective": value}
        return asha.on_trial_result(None, tune.experiment.Trial("run_trial", stub=True, trial_id=name), result)

    heard = {"good": {2: 0.2, 3: 0.1, 4: 0.1}, "stopped": {2: 0.9}, "on": {2: 0.3}, "new": {}}
    for name, objectives in heard.items():
        for stage, value in objectives.items():
            record = {"stage": stage, "objective": value}
            keeping.append_quality(f"{sweep_folder(sweep)}/trials/trial-{name}", record, 0)
    # this one's end came when the process was gone already: it is not heard of, and will be judged
    keeping.append_quality(f"{sweep_folder(sweep)}/trials/trial-on", {"stage": 3, "objective": 0.5}, 0)
    asha = restored(heard)
    rungs = [recorded for _, recorded in reversed(asha._brackets[0]._rungs)]
    assert rungs == [{"good": -0.2, "stopped": -0.9, "on": -0.3}, {"good": -0.1}, {}]
    assert decision(asha, "on", 3, 0.5) == "STOP" and decision(asha, "new", 2, 0.4) == "STOP"
    assert decision(restored({"new": {}}), "new", 2, 0.4) == "CONTINUE", "were it the first, it would go on"


def test_paths_are_as_they_are_from_here(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = sweep.base.data.model_copy(update={"shards": ("data/*.tar", "s3://b/{0..3}.tar"), "cache_dir": "latents"})
    measure = sweep.base.measure.model_copy(update={"clip": "clip"})
    base = sweep.base.model_copy(update={"data": data, "measure": measure, "first_stage": "k8.safetensors"})
    found = sweeps.from_here(sweep.model_copy(update={"base": base})).base
    assert found.data.shards == (f"{tmp_path}/data/*.tar", "s3://b/{0..3}.tar")
    assert found.data.cache_dir == f"{tmp_path}/latents" and found.measure.clip == f"{tmp_path}/clip"
    assert found.first_stage == f"{tmp_path}/k8.safetensors"
    with pytest.raises(ConfigError, match=r"measure.clip=.*/clip does not exist"):
        check(found.model_copy(update={"first_stage": None}))


@pytest.mark.parametrize("warm", [True, False])
def test_a_first_stage_of_ones_own_is_every_trials(sweep, warm):
    base = sweep.base.model_copy(update={"first_stage": "/loras/k8.safetensors"})
    given = sweep.model_copy(update={"base": base, "warm_start": warm})
    assert trial_run(given, {"lr": 1.5}, "trial-a").first_stage == "/loras/k8.safetensors"
    best = Trial("trial-a", {"lr": 1.5}, [], "finished")
    assert sweeps.best_config(given, Outcome("", [best], best)).first_stage == "/loras/k8.safetensors"
    assert sweeps.rung(given, 2) == 1, "stage 2 is the first that anyone trains"


def test_the_best_of_an_uploaded_job_outlasts_the_upload(sweep, monkeypatch):
    root = "/tmp/ray/s/runtime_resources/working_dir_files/_ray_pkg_0a1b"
    there = sweep.base.model_copy(update={"teacher": f"{root}/hypersd_ray/embedded/teacher"})
    base = Trial("base", {}, [], "finished")
    monkeypatch.setattr(sweeps.checks, "ROOT", Path(root))
    text = sweeps.best_text(sweep.model_copy(update={"base": there}), Outcome("", [base], base))
    assert "_ray_pkg_" not in text and yaml.safe_load(text)["teacher"] == "hypersd_ray/embedded/teacher"


def test_optuna_that_is_not_there_is_one_line(sweep, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"search=optuna needs it: pip install"):
        sweeps.run_sweep(sweep.model_copy(update={"search": "optuna"}))
