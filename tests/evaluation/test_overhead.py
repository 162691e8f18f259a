"""What counts as a step's time when Ray's cost is measured, and that the side whose turn it is not stands still."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from evaluation.bootstrap import Interval
from evaluation.overhead import Logged, OverheadConfig, Side, logged, median_interval, run_config, seconds_a_step
from hypersd_ray.config.base import RunError
from hypersd_ray.embedded import paths
from hypersd_ray.trainer.logs import Loggers

ROOT = Path(__file__).resolve().parents[2]


def test_steps_are_shared_out_to_the_turns_in_which_they_were_made():
    # Two steps a second while it runs: from 0 to 10, from 20 to 30 and from 50 to 60.
    turns = [(0.0, 10.0), (20.0, 30.0), (50.0, 60.0)]
    logs = [Logged(0.0, 10), Logged(7.5, 25), Logged(25.0, 40), Logged(57.0, 64)]
    assert seconds_a_step(logs, turns) == pytest.approx([0.5, 0.5]), "the third turn's end is not in the logs"
    slower = [Logged(-5.0, 0), Logged(10.0, 30), Logged(30.0, 40), Logged(60.0, 60)]
    assert seconds_a_step(slower, turns)[1:] == pytest.approx([1.0, 0.5])


def test_a_runs_steps_and_when_they_were_logged(tmp_path):
    config = run_config(OverheadConfig(), tmp_path, "run", str(paths.DATA))
    assert logged(config) == [], "before it has begun"
    begun = time.time()
    loggers = Loggers(config)
    loggers.scalars(10, {"loss": 1.0})
    time.sleep(0.3)
    loggers.scalars(20, {"loss": 1.0})
    loggers.close()
    first, second = logged(config)
    assert (first.step, second.step) == (10, 20)
    assert begun <= first.time and 0.3 <= second.time - first.time < 3


def test_the_medians_interval():
    found = median_interval([0.9, 1.0, 1.01, 1.02, 1.02, 1.03, 1.04, 1.04, 1.05, 3.0])
    assert found.mean == pytest.approx(1.025) and 0.99 < found.low < found.mean < found.high < 1.06, (
        "one turn of ten is no matter"
    )
    assert median_interval([1.02, 1.02]) == Interval(1.02, 1.02, 1.02)


def _count(file: Path) -> None:
    for number in range(10**6):
        file.write_text(str(number))
        time.sleep(0.01)


def _count_with_a_child(config: Any) -> None:
    child = mp.get_context("spawn").Process(target=_count, args=(config.folder / "child",))
    child.start()
    (config.folder / "pid").write_text(str(child.pid))
    _count(config.folder / "parent")


def _give_up(config: Any) -> None:
    del config


def _until(condition, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_side_stands_still_with_all_that_it_started(tmp_path):
    files = tmp_path / "parent", tmp_path / "child"
    counts = lambda: [file.read_text() for file in files]
    side = Side(_count_with_a_child, SimpleNamespace(folder=tmp_path))  # type: ignore[arg-type]
    try:
        _until(lambda: all(file.exists() for file in files))
        side.freeze()
        before = counts()
        time.sleep(0.5)
        assert counts() == before
        side.thaw()
        _until(lambda: all(a != b for a, b in zip(counts(), before, strict=True)))
        side.freeze()
    finally:
        side.end()  # of frozen ones too
    (first, second), child = side.turns, (tmp_path / "pid").read_text()
    assert first[0] < first[1] < second[0] < second[1], "a turn is when it ran"
    assert 0 < sum(side.cores().values()) < 3
    _until(lambda: not os.path.exists(f"/proc/{child}") or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2])


def test_a_run_that_ends_before_it_is_measured_says_so(tmp_path):
    config = run_config(OverheadConfig(), tmp_path, "short", str(paths.DATA))
    side = Side(_give_up, config)
    with pytest.raises(RunError, match="short: the run ended before it was measured"):
        side.wait_warm()
    side.end()


@pytest.mark.slow
def test_the_command_measures_both_sides_and_leaves_nothing(tmp_path):
    words = ["evaluation/overhead.py", "--turns", "3", "--turn-s", "8", "--workers", "1", "--batch", "8"]
    words += ["--out", str(tmp_path / "overhead.json")]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads((tmp_path / "overhead.json").read_text())
    low, high = found["interval"]
    assert 0.5 < low <= found["ratio"] <= high < 2
    assert "ray::RayTrainWorker" in found["ray_cores"] and set(found["plain_cores"]) == {"python"}
    assert f"ratio {found['ratio']:.3f}" in run.stdout
    left = [p.info["name"] for p in psutil.process_iter(["name", "environ"]) if str(tmp_path) in str(p.info["environ"])]
    assert left == []
