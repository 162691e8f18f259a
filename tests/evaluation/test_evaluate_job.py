"""`jobs/evaluate.py` as a user starts it: killed and started again, over Ray, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray

from evaluation.harness.judges import judge_specs
from evaluation.harness.making import make, tasks
from evaluation.harness.plan import plan
from evaluation.harness.prompts import read_rows
from evaluation.harness.reach import missing_elsewhere
from evaluation.harness.store import Store
from evaluation.harness.subjects import find_subject
from hypersd_ray.config.base import RunError
from hypersd_ray.config.data import ActorPool
from hypersd_ray.config.evaluate import EvaluateConfig, JudgesConfig
from hypersd_ray.embedded import paths
from tests.chaos.clusters import nodes

ROOT = Path(__file__).parents[2]
CLIP = str(paths.EVALUATORS / "clip")


def job(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "evaluate.py"), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_killed_and_started_again_it_makes_only_what_is_missing(folders, make_lora, prompts_file, tmp_path):
    out = tmp_path / "out"
    arguments = [
        f"lora={make_lora()}", "--base", str(folders["sd"]), "--steps", "2", "4", "--scheduler", "tcd", "--prompts", "file",
        "--prompts-file", str(prompts_file), "--judges.clip-score", CLIP, "--per-shard", "1", "--reference-steps", "0",
        "--latency-repeats", "0", "--where", "local", "--out", str(out),
    ]  # fmt: skip
    process, until = job(*arguments), time.monotonic() + 400
    while len(list(out.rglob("*.clip_features-*.npz"))) < 3:
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    kept = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix in (".tar", ".npz")}
    assert kept and not (out / "results.json").exists()

    said, errors = (second := job(*arguments)).communicate(timeout=500)
    assert second.returncode == 0, errors
    assert all(p.stat().st_mtime_ns == when for p, when in kept.items())
    results = json.loads((out / "results.json").read_text())
    there = sum(p.suffix == ".tar" for p in kept)
    assert results["done"]["made"] == 2 * 6 - there and len(list(out.rglob("*.tar"))) == 12
    assert "report.html" in said and (out / "report.html").is_file()

    whole = EvaluateConfig(
        base=str(folders["sd"]), prompts="file", prompts_file=str(prompts_file), steps=(2, 4), scheduler="tcd", reference_steps=0,
        judges=JudgesConfig(clip_score=CLIP), where="local", out=str(tmp_path / "whole"), latency_repeats=0,
    )  # fmt: skip
    rows = read_rows(whole)
    unbroken = plan(whole, rows, [find_subject(arguments[0], whole)])
    make(whole.out, tasks(Store(whole.out), unbroken.cells, rows, unbroken.specs, 64), unbroken.specs, whole.generators,
         whole.scorers, local=True)  # fmt: skip
    for cell in unbroken.cells:
        one = Store(whole.out).read_pictures(cell.key, rows).astype(int)
        parts = [Store(str(out)).read_pictures(cell.key, [row])[0] for row in rows]
        assert np.abs(one - np.stack(parts)).max() <= 1, "the batch and the kill change no picture"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "2"], "no MODEL given"),
        (["mine=s3://b/x.safetensors"], "s3://b/x.safetensors: URLs are not read here: copy it to a disk first"),
        (["gone.safetensors"], "gone.safetensors does not exist"),
        (["teacher", "--judges.clip-score", "/gone"], "--judges.clip-score: /gone does not exist"),
        (["teacher", "--stepz", "2"], "unknown option --stepz"),
        (["teacher", "--prompts", "coco5k"], "--prompts coco5k needs --prompts-file"),
    ],
)
def test_mistakes_are_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    """The job's own main, in this process: importing torch for each would cost more than the test."""
    import importlib.util

    from hypersd_ray.config.cli import run_job

    spec = importlib.util.spec_from_file_location("evaluate_job", ROOT / "jobs" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", *arguments, *(["--out", str(tmp_path)] if "--stepz" not in arguments else [])]
    )
    with pytest.raises(SystemExit) as stop:
        run_job(module.main)
    errors = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(errors) == 1 and said in errors[0]


@pytest.fixture(scope="module")
def ray_here():
    """The actors' node beside the driver's."""
    with nodes(4) as cluster:
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        try:
            yield
        finally:
            ray.shutdown()


@pytest.fixture
def slow_base(folders, tmp_path) -> tuple[Path, Callable[[], None], Callable[[], None]]:
    """A base; a function after which reading it waits, as its index is a pipe; one after which it goes on."""
    base = tmp_path / "slow"
    shutil.copytree(folders["sd"], base)
    index, kept = base / "model_index.json", tmp_path / "model_index.json"
    shutil.copy(index, kept)

    def hold() -> None:
        index.unlink()
        os.mkfifo(index)

    def open_up() -> None:
        if not index.is_fifo():
            return
        with index.open("w") as pipe:  # waits for the reader
            pipe.write(kept.read_text())
            kept.replace(index)  # for whoever reads it next

    return base, hold, open_up


@pytest.mark.cluster
def test_pools_of_actors_make_the_same_pictures(ray_here, folders, make_lora, prompts_file, slow_base, tmp_path):
    """Two generators and two scorers; judging begins before all pictures are there; what an actor meets comes back as one line."""
    config = EvaluateConfig(
        base=str(folders["sd"]), prompts="file", prompts_file=str(prompts_file), steps=(1, 2), reference_steps=0,
        judges=JudgesConfig(clip_score=CLIP), latency_repeats=0, out=str(tmp_path / "ray"),
    )  # fmt: skip
    rows = read_rows(config)
    what = plan(config, rows, [find_subject(str(make_lora()), config)])
    pool = ActorPool(min_size=2, max_size=2, num_cpus=0.5, batch_size=2)
    seen: list[tuple[int, int, int]] = []
    base, hold, open_up = slow_base
    slow = plan(config, rows, [find_subject(str(base), config)]).cells[:1]
    hold()
    late = threading.Timer(240, open_up)  # judging waited for all pictures: the test fails, and ends
    late.start()

    def progress(*numbers: int) -> None:
        seen.append(numbers)
        held.append((base / "model_index.json").is_fifo())
        open_up()

    held: list[bool] = []
    todo = [
        *tasks(Store(config.out), what.cells, rows, what.specs, 2),
        *tasks(Store(config.out), slow, rows[:2], what.specs, 2),
    ]
    done = make(config.out, todo, what.specs, pool, pool, progress)
    late.cancel()
    assert held[0], "the first is judged while the last cannot be made yet"
    assert (done.made, done.judged, len(seen)) == (14, 14, 7) and seen[-1] == (7, 7, 14)
    [(node, lost)] = missing_elsewhere([str(base), "/gone"], (pool,)).items()
    assert lost == ["/gone"] and node, "the actors' node, and not the driver's"
    assert missing_elsewhere(["/gone"], (pool.model_copy(update={"label_selector": {"zone": "x"}}),)) == {}

    here = str(tmp_path / "here")
    make(here, tasks(Store(here), what.cells, rows, what.specs, 64), what.specs, pool, pool, local=True)
    for cell in what.cells:
        one = Store(here).read_pictures(cell.key, rows).astype(int)
        parts = [Store(config.out).read_pictures(cell.key, rows[i : i + 2]) for i in range(0, 6, 2)]
        assert np.abs(one - np.concatenate(parts)).max() <= 1
        values = np.concatenate(
            [Store(config.out).read_values(cell.key, rows[i : i + 2], what.specs[0].file)[0] for i in (0, 2, 4)]
        )
        np.testing.assert_allclose(values, Store(here).read_values(cell.key, rows, what.specs[0].file)[0], atol=0.2)

    blocked = tmp_path / "full"
    folder = Path(Store(str(blocked)).folder(what.cells[0].key))
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where a folder should be")
    todo = tasks(Store(str(blocked)), what.cells[:1], rows[:2], [], 2)
    with pytest.raises(RunError, match=r"cannot be written \(.*\); what was done is kept") as caught:
        make(str(blocked), todo, [], pool, pool)
    assert "\n" not in str(caught.value)
    broken = judge_specs(JudgesConfig(clip_score=str(folders["sd"])))[:1]
    with pytest.raises(ValueError, match=r"open_clip_config.json cannot be read"):
        make(config.out, tasks(Store(config.out), what.cells[:1], rows[:2], broken, 2), broken, pool, pool)
