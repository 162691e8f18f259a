"""`ray job submit`, both ways that the README shows, to a real cluster."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

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
