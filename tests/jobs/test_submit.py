"""`ray job submit`, with a working directory and bare, to a real cluster."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import yaml

from tests.chaos.faults import record

pytestmark = pytest.mark.job

# Two stages of two steps on the smallest shard, which lies in the checkout: the path is relative to where the job runs.
SHORT = [
    "--distill.k-list", "4", "1", "--distill.n-list", "40", "40", "--distill.steps-list", "2", "2",
    "--optim.batch", "8", "--data.shards", "hypersd_ray/embedded/data/val-00001.tar", "--lora.rank", "2",
    "--run.log-every", "1", "--run.prompts", "a noto pizza on a blue background",
]  # fmt: skip
ENTRYPOINT = ["python", "jobs/tscd.py", "tiny", *SHORT]


def check_output(done, folder: Path) -> None:
    """The job succeeded, its log ends with where everything is, and there it is."""
    assert done.returncode == 0, done.stdout
    assert "succeeded" in done.stdout
    # Ray's own cleaner complains so where a second cluster runs on the machine.
    lines = [line for line in done.stdout.splitlines() if "PlacementGroupCleaner" not in line]
    assert "Traceback" not in "\n".join(lines), done.stdout
    for line in (
        f"LoRA     {folder}/lora/tscd-k1.safetensors",
        f"picture  {folder}/grid.png",
        f"picture  {folder}/curves.png",
        f"config   {folder}/config.yaml",
        f"logs     tensorboard --logdir {folder}/tensorboard",
        f"pipe.load_lora_weights('{folder}/lora/tscd-k1.safetensors')",
    ):
        assert line in done.stdout
    assert re.search(r"stage 2/2 k=1 step 2/2  consistency [\d.]+ .*images/s", done.stdout)
    assert {p.name for p in (folder / "lora").iterdir()} == {
        f"tscd-k{k}{layout}.safetensors" for k in (4, 1) for layout in ("", "-kohya")
    }
    assert (folder / "grid.png").stat().st_size > 10_000
    assert yaml.safe_load((folder / "config.yaml").read_text())["distill"]["steps_list"] == [2, 2]


def test_a_job_with_an_uploaded_working_directory(cluster):
    """The products are not left in the upload, which Ray deletes, but under the home; and the upload is small."""
    done = cluster.submit("--working-dir", ".", entrypoint=ENTRYPOINT)
    check_output(done, cluster.home / "runs" / "tiny-minutes")
    (package,) = cluster.temporary.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    assert (package / "jobs" / "tscd.py").exists()
    assert not {".git", "tests", "runs", "docs", ".venv"} & {p.name for p in package.iterdir()}
    size = sum(f.stat().st_size for f in package.rglob("*") if f.is_file())
    assert size < 100 * 2**20, "Ray refuses more than 512 MiB; what a user waits for is far less"


def test_a_bare_job_on_a_cluster_started_in_the_checkout(cluster, tmp_path):
    done = cluster.submit(entrypoint=[*ENTRYPOINT, "--run.out", str(tmp_path), "--data.cache", "none"])
    check_output(done, tmp_path / "tiny-minutes")


def test_a_jobs_mistake_is_one_line_in_its_log(cluster):
    done = cluster.submit(entrypoint=["python", "jobs/tscd.py", "tiny", "--run.workers", "3"])
    assert done.returncode != 0
    said = "error: optim.batch=32 is not divisible by run.workers * optim.accumulation = 3; the nearest accepted is 33"
    assert said in done.stdout
    # Ray's own cleaner complains so where a second cluster runs on the machine.
    lines = [line for line in done.stdout.splitlines() if "PlacementGroupCleaner" not in line]
    assert "Traceback" not in "\n".join(lines), done.stdout


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_a_stopped_job_goes_on_when_it_is_submitted_again(cluster, tmp_path):
    """`ray job stop` leaves the checkpoint of its last step and nobody behind; the same submission goes on from there."""
    job = ["python", "jobs/tscd.py", "tiny", *SHORT, "--run.out", str(tmp_path), "--data.cache", "none", "--run.name", "again",
           "--distill.steps-list", "150", "2", "--run.checkpoint-every", "1000"]  # fmt: skip
    metrics = tmp_path / "again" / "metrics.jsonl"
    first = cluster.submit("--no-wait", "--submission-id", "first", entrypoint=job)
    assert first.returncode == 0, first.stdout
    until = time.monotonic() + 400
    while not metrics.exists():
        assert time.monotonic() < until, cluster.ray("job", "logs", "first")
        time.sleep(0.2)
    begun = time.monotonic()
    cluster.ray("job", "stop", "first")
    said = cluster.ray("job", "logs", "first")
    assert "error: run again was told to stop; the same command goes on from " in said and "Traceback" not in said, said
    (saved,) = (tmp_path / "again").glob("checkpoint_0*")
    step = int(saved.name.removeprefix("checkpoint_"))
    assert 0 < step < 150 and (saved / "manifest.json").exists(), "between two periodic ones"
    until = time.monotonic() + 60
    while "RayTrainWorker" in (actors := cluster.ray("list", "actors", "--filter", "state=ALIVE")):
        assert time.monotonic() < until, actors
        time.sleep(1)
    stopped, begun, before = time.monotonic() - begun, time.monotonic(), metrics.stat().st_size
    second = cluster.submit("--no-wait", "--submission-id", "second", entrypoint=job)
    assert second.returncode == 0, second.stdout
    until = begun + 400
    while metrics.stat().st_size == before:
        assert time.monotonic() < until, cluster.ray("job", "logs", "second")
        time.sleep(0.2)
    went_on = time.monotonic() - begun
    until = time.monotonic() + 550
    while "SUCCEEDED" not in (status := cluster.ray("job", "status", "second").upper()):
        assert "FAILED" not in status and time.monotonic() < until, cluster.ray("job", "logs", "second")
        time.sleep(1)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 153)), "no step is missing, none made twice"
    record(
        "`ray job stop`, submitted again",
        f"checkpoint of the last step, no worker left after {stopped:.0f} s; went on, no step missing",
        seconds=went_on,
        lost=0,
    )
