"""A sweep of two trials on a real Ray: one stopped by ASHA, killed on the way, started again, and what it leaves."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import yaml
from ray.util import placement_group_table

from evaluation.sweep import compare, draw_parallel, objective_difference, table, write_csv
from hypersd_ray.config.sweep import SpaceConfig, SweepConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.trainer import keeping, run
from hypersd_ray.trainer.checks import in_checkout
from hypersd_ray.training.quality import Quality, objective
from hypersd_ray.tuning import sweep as sweeps
from tests.chaos.faults import record
from tests.helpers.pipelines import CAPTIONS
from tests.trainer.helpers import ROOT, wait_for


def held_places() -> list[dict]:
    """Placement groups that are not given back."""
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


@pytest.mark.cluster
def test_a_run_whose_process_is_killed_gives_its_places_back(cluster, make_config):
    """As Ray Tune ends trials. Without the dashboard it would not."""
    config = make_config("ended-from-outside", distill={"k_list": (2,), "n_list": (8,), "steps_list": (2000,)})

    @ray.remote(num_cpus=0)
    class Trial:
        def train(self) -> None:
            run.train(config)

    before, trial = len(held_places()), Trial.remote()
    trial.train.remote()
    wait_for((Path(config.run.out) / config.run.name / "metrics.jsonl").exists, seconds=120)
    assert len(held_places()) > before
    ray.kill(trial)
    wait_for(lambda: len(held_places()) == before, seconds=60)


LAST = 10
"""Steps of the last stage: so many that a trial which is stopped for what the stage before it was worth is still in it."""


@pytest.mark.cluster
def test_a_sweep_and_what_it_leaves(cluster, make_config, tmp_path, capsys):
    base = make_config(
        "base", distill={"k_list": (4, 2, 1), "n_list": (8, 8, 8), "steps_list": (2, 2, LAST)}, optim={"warmup": 0},
        measure={"prompts": tuple(CAPTIONS[:2]), "steps": (1,), "reference_steps": 2}, run={"checkpoint_every": 100},
    )  # fmt: skip
    # One trial after the other. What Optuna draws first with this seed hardly learns, what it draws then loses all that it knew.
    config = SweepConfig(
        base=base, space=SpaceConfig(lr=(0.1, 1000.0)), name="sweep", trials=2, search="optuna", seed=8, concurrent=1,
        confirm=("a blue cube", "a red ball"),
    )  # fmt: skip
    outcome = sweeps.run_sweep(config)
    said = capsys.readouterr().out
    assert said.count(" finished: objective ") == 1 and " after stage 3/3  adv_start " in said
    assert said.count(" stopped: objective ") == 1 and " after stage 2/3  adv_start " in said
    wait_for(lambda: not held_places(), seconds=60)
    folder = tmp_path / "runs" / "sweep"
    first, better, worse = outcome.trials
    trials = [better, worse]
    assert (first.name, len(first.stages)) == ("base", 3) and better.point["lr"] < worse.point["lr"]
    assert (better.state, worse.state) == ("finished", "stopped")
    # Trials have the base's first stage and begin with their second, each in a folder of its own.
    lines = {t.name: (folder / "trials" / t.name / "metrics.jsonl").read_text().splitlines() for t in trials}
    made = {name: sorted({json.loads(line)["step"] for line in own}) for name, own in lines.items()}
    assert made[better.name] == list(range(3, 5 + LAST))
    assert made[worse.name][:2] == [3, 4] and made[worse.name][-1] < 4 + LAST
    assert [record["stage"] for record in better.stages] == [2, 3]
    assert [record["stage"] for record in worse.stages] == [2] and worse.objective(3) == float("inf")
    assert better.objective(3) < float("inf") and better.point.keys() == sweeps.searched(config.space).keys()
    assert outcome.best.objective(3) == min(t.objective(3) for t in outcome.trials)
    assert len(list((folder / "references").iterdir())) == 1, "the teacher's end points are made once"

    best = sweeps.best_config(config, outcome)
    again = TSCDConfig.model_validate(yaml.safe_load(sweeps.best_text(config, outcome)))
    assert again == best and best.run.name == "sweep-best"
    of_trial = outcome.trials[1]
    best = sweeps.best_config(config, replace(outcome, best=of_trial))
    measured = sweeps.trial_run(config, of_trial.point, of_trial.name)
    assert best.first_stage == measured.first_stage, "what was measured is what the file trains"
    assert (best.distill, best.adversarial, best.optim) == (measured.distill, measured.adversarial, measured.optim)
    assert "Delete first_stage" in sweeps.best_text(config, replace(outcome, best=of_trial))
    write_csv(config, outcome, tmp_path / "trials.csv")
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert len(rows) == 3 and rows[0]["run"] == outcome.best.name and float(rows[0]["objective_k1"])
    assert table(config, outcome).count("\n") == 4
    draw_parallel(config, outcome, tmp_path / "trials.png")
    assert (tmp_path / "trials.png").stat().st_size > 10_000
    text = compare(config, replace(outcome, best=of_trial))  # drawn where a worker would be
    assert "2 prompts that nothing was chosen by" in text and "best minus base: " in text
    assert "No trial was better" in compare(config, replace(outcome, best=first))

    # The same sweep again: nothing is trained a second time.
    before = {path: path.stat().st_mtime for path in folder.glob("*/*/tensorboard/*")}  # a process that trains adds one
    again = sweeps.run_sweep(config)
    assert {t.name: (t.state, t.stages) for t in again.trials} == {t.name: (t.state, t.stages) for t in outcome.trials}
    assert len(before) == 3 and before == {path: path.stat().st_mtime for path in folder.glob("*/*/tensorboard/*")}
    other = config.model_copy(update={"space": config.space.model_copy(update={"lr": (0.5, 2.0)})})
    for changed, field in ((other, "space"), (config.model_copy(update={"trials": 3}), "trials")):
        with pytest.raises(ValueError, match=rf"{field} differs from the sweep that is in .*: set name"):
            sweeps.run_sweep(changed)
    with pytest.raises(ValueError, match=r"began with \d trials at a time, now 0 fit"):
        sweeps._settled(str(folder), 0)


NO_DASHBOARD = """
import ray
from hypersd_ray.tuning import sweep
ray.init("local", num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
sweep._check_dashboard()
"""


@pytest.mark.cluster
def test_a_cluster_without_a_dashboard_is_refused():
    alone = {name: value for name, value in os.environ.items() if name != "RAY_API_SERVER_ADDRESS"}
    ended = subprocess.run(
        [sys.executable, "-c", NO_DASHBOARD], cwd=ROOT, env=alone, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1 and "ConfigError: the cluster's dashboard does not answer" in ended.stderr


DRIVE = """
import yaml
from pathlib import Path
from hypersd_ray.config.sweep import SweepConfig
from hypersd_ray.tuning import sweep
sweep.run_sweep(SweepConfig.model_validate(yaml.safe_load(Path({file!r}).read_text())))
"""


@pytest.mark.cluster
@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "told to stop"])
def test_a_sweep_whose_driver_ends_goes_on(cluster, make_config, tmp_path, number):
    """While trials train: started again it has the same trials, none begins anew, and told to stop none loses a step."""
    base = make_config(
        "base", distill={"k_list": (2, 1), "n_list": (8, 8), "steps_list": (4, 120)},
        measure={"prompts": tuple(CAPTIONS[:2]), "steps": (1,), "reference_steps": 2},
    )  # fmt: skip
    config = SweepConfig(base=base, name="ended", trials=2, scheduler="none")
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    folder = tmp_path / "runs" / "ended"
    code = DRIVE.format(file=str(tmp_path / "sweep.yaml"))
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=cluster, cwd=ROOT, stderr=(tmp_path / "stderr").open("w")
    )
    wait_for(
        lambda: (
            len({path.parts[-3] for path in folder.glob("trials/*/checkpoint_*/manifest.json")}) == 2
            and sweeps._restorable(str(folder / "tune"))
        ),
        process=process,
    )
    process.send_signal(number)
    told = time.monotonic()
    process.wait()
    said, ending = (tmp_path / "stderr").read_text(), time.monotonic() - told
    if number == signal.SIGTERM:
        assert (
            process.returncode == 1
            and f"error: sweep ended was told to stop; the same command goes on from {folder}\n" in said
        )
    known = {path.name for path in (folder / "trials").iterdir()}
    outcome = sweeps.run_sweep(config)
    assert known <= {trial.name for trial in outcome.trials[1:]} and len(outcome.trials) == 3
    assert all(trial.state == "finished" for trial in outcome.trials)
    steps = [
        [row["step"] for row in map(json.loads, p.read_text().splitlines()) if "loss" in row]  # not those of quality
        for p in folder.glob("trials/*/metrics.jsonl")
    ]
    assert len(steps) == 2 and all(set(own) == set(range(5, 125)) for own in steps)
    assert all(own.count(5) == 1 for own in steps), "each goes on from its checkpoint"
    again = sum(len(own) for own in steps) - 240
    if number == signal.SIGTERM:
        assert again == 0
        record(
            "sweep told to stop by SIGTERM, or Ctrl-C; same command again",
            f"a checkpoint of each trial's last step, ended after {ending:.0f} s; same trials",
            lost=again,
        )
    else:
        record("driver of a sweep SIGKILLed, same command again", "same trials, each from its checkpoint", lost=again)


def test_the_objectives_interval_is_of_the_objectives_difference():
    ours = Quality({1: [0.2, 0.3, 0.4], 4: [0.1, 0.1, 0.2]}, {1: [0.3, 0.3, 0.2], 4: [0.3, 0.2, 0.3]}, [0.3, 0.3, 0.3])
    theirs = Quality(
        {1: [0.4, 0.5, 0.6], 4: [0.2, 0.3, 0.2]}, {1: [0.2, 0.3, 0.2], 4: [0.3, 0.2, 0.2]}, [0.3, 0.3, 0.3]
    )
    found = objective_difference(ours, theirs, 0.5)
    assert found.mean == pytest.approx(objective(ours, 0.5) - objective(theirs, 0.5))
    assert found.low < found.mean < found.high < 0
    same = objective_difference(theirs, theirs, 0.5)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_a_sweep_killed_before_its_first_record_begins_anew(tmp_path):
    (tmp_path / "tuner.pkl").write_bytes(b"half")
    assert not sweeps._restorable(str(tmp_path))
    (tmp_path / "experiment_state-2026.json").write_text("{}")
    assert sweeps._restorable(str(tmp_path))


def test_another_upload_of_the_same_checkout_is_the_same_sweep():
    teacher = "hypersd_ray/embedded/teacher"
    theirs = {"teacher": f"/tmp/ray/s/_ray_pkg_0a1b/{teacher}", "prompts": [f"/x/_ray_pkg_ff/{teacher}"]}
    assert in_checkout(theirs) == in_checkout({"teacher": f"{ROOT}/{teacher}", "prompts": [teacher]})


def test_quality_of_a_stage_is_kept_once(tmp_path):
    for stage, value in ((1, 0.5), (2, 0.3), (2, 0.2)):
        keeping.append_quality(str(tmp_path), {"stage": stage, "objective": value}, 0)
    assert [r["objective"] for r in keeping.read_quality(str(tmp_path))] == [0.5, 0.2]
    assert keeping.read_quality(str(tmp_path / "none")) == []
