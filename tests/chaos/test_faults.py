"""A run is broken in every way that one machine allows: it ends as if nothing had been, or in one line.

python -m pytest -m chaos tests/chaos            # writes runs/chaos.md
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hypersd_ray.config.base import RunError
from hypersd_ray.data.plan import shard_order
from hypersd_ray.data.sources import find_shards
from tests.chaos.conftest import EVERY
from tests.chaos.faults import (
    checkpoints,
    kill_self,
    record,
    removing,
    slow,
    storage_away,
    truncate_newest_and_die,
)
from tests.trainer.helpers import folder_of, job, wait_for, write_config

pytestmark = [pytest.mark.chaos, pytest.mark.cluster, pytest.mark.timeout(1500)]


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text
    return text


def test_a_worker_killed_five_times(cluster, make, train_broken, assert_unchanged):
    config = make("killed-5")
    at = sorted(random.Random(1).sample(range(2, 18), 5))
    told = train_broken(config, dict.fromkeys(at, kill_self))
    assert told.restarts == 5 and told.lost <= 5 * EVERY
    assert_unchanged(config, told)
    record(f"worker SIGKILLed 5 times (steps {', '.join(map(str, at))})", "finished, same weights", told)


def test_a_truncated_checkpoint(cluster, make, train_broken, assert_unchanged, capfd):
    """The one before is taken and that is said; the damaged one is not taken for the new one of its name."""
    config = make("truncated")
    told = train_broken(config, {11: truncate_newest_and_die})
    assert told.restarts == 1 and told.lost <= 2 * EVERY
    assert "checkpoint_00000009 is damaged, going on from the one before" in capfd.readouterr().out
    assert_unchanged(config, told)
    record("newest checkpoint truncated, worker SIGKILLed", "said so, went on from the one before, same weights", told)


def test_storage_that_is_away_during_a_checkpoint(cluster, make, train_broken, assert_unchanged):
    config = make("away")
    told = train_broken(config, {9: storage_away(30)})
    assert told.restarts == 0
    assert_unchanged(config, told)
    assert told.longest >= 29
    record("storage away for 30 s during a checkpoint", "waited, finished, same weights", told, told.longest)


def test_a_full_disk(cluster, make, train_broken, assert_unchanged, tmp_path):
    """A small file system of its own: too small for the second checkpoint; then there is room."""
    out = tmp_path / "small"
    out.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(out)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    try:
        config = make("full", run={"out": str(out), "storage_patience_s": 3, "loggers": ()})
        with pytest.raises(RunError) as caught:
            train_broken(config)
        said = one_line(caught)
        assert "could not be written for" in said and "No space left on device" in said
        assert "run.storage_patience_s=3" in said and "run.out" in said
        subprocess.run(["mount", "-o", "remount,size=64m", str(out)], check=True)
        told = train_broken(config)
        assert told.lost <= EVERY
        assert_unchanged(config, told)
    finally:
        subprocess.run(["umount", str(out)], check=False)
    record("disk full", "stopped with one line; with room, the same command finished, same weights", told)


def test_a_corrupt_shard_of_latents(cluster, make, train_broken, latents, tmp_path):
    shutil.copytree(latents, tmp_path / "latents")
    order = shard_order(find_shards((str(tmp_path / "latents"),)).urls, 0, 0)
    shard = Path(order[1].removeprefix("file://"))
    shard.write_bytes(shard.read_bytes()[:2000])
    config = make("corrupt", shards=tmp_path / "latents")
    begun = time.monotonic()
    with pytest.raises(RunError) as caught:
        train_broken(config)
    said = one_line(caught)
    assert str(shard.name) in said and "jobs/precompute.py" in said
    record("corrupt shard of latents", "stopped with one line that names it", None, time.monotonic() - begun)


def test_shards_of_pictures_corrupt_and_vanishing(cluster, make, train_broken, shards, tmp_path):
    """Both are skipped and counted: the run goes on with what there is."""
    folder = tmp_path / "pictures"
    shutil.copytree(shards, folder)
    names = sorted(folder.glob("*.tar"))
    order = [Path(u.removeprefix("file://")) for u in shard_order(find_shards((str(folder),)).urls, 0, 0)]
    names[0].write_bytes(names[0].read_bytes()[: names[0].stat().st_size // 2])
    gone = next(p for p in reversed(order) if p != names[0])
    data = make("skipping", shards=folder).data.model_copy(update={"reject_grace": 10_000})
    config = make("skipping", shards=folder, data=data)
    told = train_broken(config, {1: removing(gone)})
    rejects = (folder_of(config) / "rejects.jsonl").read_text()
    assert "truncated_shard" in rejects and names[0].name in rejects
    assert "unreadable_shard" in rejects and gone.name in rejects
    assert sum(map(len, told.keys.values())) == 18 * 4
    assert told.restarts == 0
    record("corrupt shard, and one that vanishes mid-epoch (pictures)", "skipped and listed, finished", told)


def test_a_shard_of_latents_that_vanishes(cluster, make, train_broken, latents, tmp_path):
    shutil.copytree(latents, tmp_path / "latents")
    shard = Path(find_shards((str(tmp_path / "latents"),)).urls[0].removeprefix("file://"))
    config = make("vanished", shards=tmp_path / "latents")
    with pytest.raises(RunError) as caught:
        train_broken(config, {2: removing(shard)})
    assert shard.name in one_line(caught)
    record("shard of latents vanishes mid-epoch", "stopped with one line that names it")


def test_a_slow_worker(cluster, make, train_broken, assert_unchanged):
    """The others wait; nothing else happens."""
    config = make("slow", run={"workers": 2})
    told = train_broken(config, {5: slow(10)}, rank=1)
    assert told.restarts == 0 and told.longest >= 10
    assert_unchanged(config, told, workers=2)
    record("one of 2 workers stands still for 10 s", "the other waited, same weights", told, told.longest)


DRIVE = """
import yaml
from pathlib import Path
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.trainer import run
from tests.chaos.faults import broken, slow
faults = {{step: slow({every}) for step in range(1, 31)}} if {every} else {{}}
run.train_loop = broken(Path({trace!r}), faults | {{{step}: slow({seconds})}})
from hypersd_ray.config.cli import run_job
run_job(lambda: run.train(TSCDConfig.model_validate(yaml.safe_load(Path({config!r}).read_text()))) and 0)
"""


def drive(
    config, tmp_path: Path, environment: dict, step: int, seconds: float = 600, every_step_s: float = 0
) -> tuple[subprocess.Popen, Path]:
    """A driver of its own process whose worker stands still at `step`, once, and for a moment at every step."""
    file, trace = tmp_path / "config.yaml", tmp_path / f"{config.run.name}.trace"
    write_config(config, file)
    values = {"trace": str(trace), "step": step, "seconds": seconds, "every": every_step_s, "config": str(file)}
    code = DRIVE.format(**values)
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return process, trace


def test_a_killed_driver_and_its_job_again(cluster, make, train_broken, assert_unchanged, tmp_path):
    config = make("driver")
    process, trace = drive(config, tmp_path, cluster, step=11)
    wait_for(lambda: Path(f"{trace}.11").exists(), process=process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    told = train_broken(config)
    assert told.restarts == 1 and told.lost <= EVERY
    assert_unchanged(config, told)
    record("driver SIGKILLed, same command again", "finished, same weights", told)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_stopped_job_leaves_the_checkpoint_of_its_last_step(
    cluster, make, train_broken, assert_unchanged, tmp_path, number
):
    """SIGTERM, as `ray job stop` sends, and Ctrl-C: a checkpoint between two periodic ones, one line, and no step is made
    again."""
    config = make("stopped")
    process, trace = drive(config, tmp_path, cluster, step=11, seconds=3, every_step_s=0.4)
    wait_for(lambda: Path(f"{trace}.11").exists(), process=process)
    asked = time.monotonic()
    process.send_signal(number)
    said, _ = process.communicate(timeout=300)
    took = time.monotonic() - asked
    assert process.returncode == 1, said
    last = said.strip().splitlines()[-1]
    assert (
        last.startswith("error: run stopped was told to stop; the same command goes on from ")
        and "Traceback" not in said
    )
    newest = checkpoints(config)[-1]
    assert last.endswith(newest) and int(newest.removeprefix("checkpoint_")) >= 11
    told = train_broken(config)
    assert told.lost == 0 and told.restarts == 1
    assert_unchanged(config, told)
    record(
        f"job told to stop ({number.name}), same command again", "checkpoint of the last step, same weights", told, took
    )


def test_all_checkpoints_damaged_is_one_line(cluster, make, train_broken, tmp_path):
    config = make("hopeless", run={"max_failures": 0})
    folder = folder_of(config)
    for name in ("checkpoint_00000003", "checkpoint_00000006"):
        (folder / name).mkdir(parents=True)
        (folder / name / "manifest.json").write_text("{")
    process = job(config, tmp_path / "config.yaml", os.environ | cluster)
    _, complaints = process.communicate(timeout=500)
    assert process.returncode == 1 and "Traceback" not in complaints
    last = complaints.strip().splitlines()[-1]
    assert last.startswith("error: none of the 2 checkpoints in ") and "set run.name to start another run" in last
