"""Loggers without a cluster: files on resume, and what a missing package says."""

from __future__ import annotations

import json
import resource
import sys

import pytest
import torch

from evaluation.pictures import draw_curves
from hypersd_ray.config.base import ConfigError
from hypersd_ray.trainer import storage
from hypersd_ray.trainer.checks import check
from hypersd_ray.trainer.logs import JsonLines, TensorBoard
from hypersd_ray.trainer.stopwatch import Stopwatch
from tests.helpers.distil import make_config
from tests.helpers.pipelines import build_pipeline


def test_json_lines_go_on_and_hold_no_nan(tmp_path):
    for step, loss in ((1, 0.5), (2, float("nan"))):
        log = JsonLines(str(tmp_path / "run"))
        log.scalars(step, {"loss": loss})
        log.close()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None},
    ]


def test_a_disk_that_takes_half_a_line_leaves_none(tmp_path):
    log, path = JsonLines(str(tmp_path)), tmp_path / "metrics.jsonl"
    log.scalars(1, {"loss": 0.5})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 7, limits[1]))
    try:
        log.scalars(2, {"loss": 0.25})
        before = path.read_text()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == '{"step": 1, "loss": 0.5}\n'
    log.scalars(3, {"loss": 0.125})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_line_that_a_killed_process_tore_costs_no_other_and_no_picture(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "consistency": 0.5}\n{"step": 2, "cons')
    JsonLines(str(tmp_path)).scalars(3, {"consistency": 0.25})
    assert path.read_text().splitlines()[1:] == ['{"step": 2, "cons', '{"step": 3, "consistency": 0.25}']
    draw_curves(path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_json_lines_at_a_url_outlive_a_process_that_dies(tmp_path):
    """After `flush` the file is there, before `close`; another process goes on with it."""
    url = f"file://{tmp_path}/run"
    log = JsonLines(url)
    log.scalars(1, {"loss": 0.5})
    log.flush()
    again = JsonLines(url)
    again.scalars(2, {"loss": 0.25})
    again.close()
    assert [json.loads(line)["step"] for line in storage.read_text(f"{url}/metrics.jsonl").splitlines()] == [1, 2]


def test_tensorboard_hides_what_a_killed_process_wrote_past_its_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoard(str(tmp_path), 0)
    for step in range(1, 6):
        first.scalars(step, {"loss": float(step)})
    first.picture(5, "grid", torch.zeros(3, 4, 4, dtype=torch.uint8))
    first.close()
    second = TensorBoard(str(tmp_path), 3)  # went on from step 3
    second.scalars(4, {"loss": 40.0})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_says_how_to_install_it(name, tmp_path, monkeypatch):
    teacher = tmp_path / "teacher"
    build_pipeline("sd", teacher, micro=True)
    config = make_config(teacher, data={"shards": str(tmp_path)}, run={"loggers": (name,), "out": str(tmp_path)})
    # As where it is not, whatever is installed here: the real question goes to an empty path.
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(
        ConfigError, match=rf"run.loggers has {name}, which is not installed: pip install 'hypersd-ray\[{name}\]'"
    ):
        check(config)


def test_the_stopwatch_leaves_out_pauses_and_counts_waiting(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    watch = Stopwatch(make_config(tmp_path, distill={"steps_list": (20, 20)}), 1)
    for step in range(1, 26):
        watch.wait_begins()
        now[0] += 0.25  # waiting
        watch.wait_ends()
        now[0] += 0.75  # computing
        watch.step()
        if step % 5 == 0:
            watch.pause()
            now[0] += 100.0
            watch.go_on()
    rates = watch.rates(1, 5)
    assert rates["data_wait"] == pytest.approx(0.25)
    assert rates["images_per_s"] == pytest.approx(4.0)
    assert rates["seconds_left"] == pytest.approx(15.0)
    assert watch.totals() == {"data_wait_share": pytest.approx(0.25), "train_seconds": pytest.approx(20.0)}
    assert watch.global_step(1, 5) == 25


def test_a_jobs_uploaded_folder_is_no_place_for_products(tmp_path, monkeypatch):
    """Ray deletes it with the job."""
    run = make_config(tmp_path).run
    monkeypatch.chdir(tmp_path)
    assert storage.run_folder(run) == f"{tmp_path}/runs/tscd"
    package = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert storage.run_folder(run) == f"{tmp_path}/home/runs/tscd"
    assert storage.run_folder(run.model_copy(update={"out": "/data"})) == "/data/tscd"
    assert storage.run_folder(run.model_copy(update={"out": "s3://b/runs/"})) == "s3://b/runs/tscd"
