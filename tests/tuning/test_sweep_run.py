"""A sweep of two trials on a real Ray: killed on the way, started again, and what it leaves."""

from __future__ import annotations

import csv
import json

import pytest
import yaml

from evaluation.sweep import compare, draw_parallel, table, write_csv
from hypersd_ray.config.sweep import SweepConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.trainer import keeping
from hypersd_ray.tuning import sweep as sweeps
from tests.helpers.pipelines import CAPTIONS

pytestmark = pytest.mark.cluster


def test_a_sweep_and_what_it_leaves(cluster, make_config, tmp_path):
    base = make_config(
        "base", distill={"k_list": (2, 1), "n_list": (8, 8), "steps_list": (4, 3)},
        measure={"prompts": tuple(CAPTIONS[:2]), "steps": (1, 2), "reference_steps": 4},
    )  # fmt: skip
    config = SweepConfig(base=base, name="sweep", trials=2, confirm=("a blue cube", "a red ball"))
    outcome = sweeps.run_sweep(config)
    folder = tmp_path / "runs" / "sweep"
    first, *trials = outcome.trials
    assert (first.name, len(first.stages), len(trials)) == ("base", 2, 2)
    # Trials have the base's first stage and begin with their second: 3 of 7 steps, each in a folder of its own.
    assert len({t.name for t in trials}) == 2
    for trial in trials:
        lines = [
            json.loads(line) for line in (folder / "trials" / trial.name / "metrics.jsonl").read_text().splitlines()
        ]
        assert sorted({row["step"] for row in lines}) == [5, 6, 7]
        assert [record["stage"] for record in trial.stages] == [2] and trial.state == "finished"
        assert trial.objective(2) < float("inf") and trial.point.keys() == sweeps.searched(config.space).keys()
    assert outcome.best.objective(2) == min(t.objective(2) for t in outcome.trials)
    assert len(list((folder / "references").iterdir())) == 1, "the teacher's end points are made once"

    best = sweeps.best_config(config, outcome)
    again = TSCDConfig.model_validate(yaml.safe_load(yaml.safe_dump(best.model_dump(mode="json"))))
    assert again == best and best.first_stage is None and best.run.name == "sweep-best"
    write_csv(config, outcome, tmp_path / "trials.csv")
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert len(rows) == 3 and rows[0]["run"] == outcome.best.name and float(rows[0]["objective_k1"])
    assert table(config, outcome).count("\n") == 4
    draw_parallel(config, outcome, tmp_path / "trials.png")
    assert (tmp_path / "trials.png").stat().st_size > 10_000
    text = compare(config, outcome)
    assert ("2 prompts that nothing was chosen by" in text) != ("No trial was better" in text)

    # The same sweep again: nothing is trained a second time.
    before = {t.name: (folder / "trials" / t.name / "metrics.jsonl").read_bytes() for t in trials}
    again = sweeps.run_sweep(config)
    assert {t.name: t.stages for t in again.trials} == {t.name: t.stages for t in outcome.trials}
    assert before == {n: (folder / "trials" / n / "metrics.jsonl").read_bytes() for n in before}
    other = config.model_copy(update={"space": config.space.model_copy(update={"lr": (0.5, 2.0)})})
    with pytest.raises(ValueError, match=r"space differs from the sweep that is in .*: set name"):
        sweeps.run_sweep(other)


def test_quality_of_a_stage_is_kept_once(tmp_path):
    for stage, value in ((1, 0.5), (2, 0.3), (2, 0.2)):
        keeping.append_quality(str(tmp_path), {"stage": stage, "objective": value}, 0)
    assert [r["objective"] for r in keeping.read_quality(str(tmp_path))] == [0.5, 0.2]
    assert keeping.read_quality(str(tmp_path / "none")) == []
