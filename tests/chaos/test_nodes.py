"""Nodes that go, with and without a notice, and a cluster that grows from nothing and shrinks to nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chaos.clusters import drain, environment, growing, node_of, nodes
from tests.chaos.conftest import EVERY
from tests.chaos.faults import checkpoints, record, story, until
from tests.chaos.test_faults import drive
from tests.jobs.conftest import ROOT
from tests.trainer.helpers import folder_of, wait_for, write_config

pytestmark = [pytest.mark.chaos, pytest.mark.cluster, pytest.mark.timeout(1500)]


def last_line(trace: Path) -> dict:
    return json.loads(trace.read_text().splitlines()[-1])


def test_a_node_is_removed(cluster, make, assert_unchanged, unbroken, tmp_path):
    unbroken()
    config = make("node")
    with nodes(2, 2) as two:
        process, trace = drive(config, tmp_path, environment(two), step=8)
        wait_for(lambda: Path(f"{trace}.8").exists(), process=process)
        two.remove_node(node_of(two, last_line(trace)["node"]), allow_graceful=False)
        said, _ = process.communicate(timeout=500)
        assert process.returncode == 0, said
    told = story(trace)
    assert told.restarts == 1 and told.lost <= EVERY
    assert_unchanged(config, told)
    record("node removed", "went on on another node, same weights", told)


def test_a_notice_of_preemption(cluster, make, assert_unchanged, unbroken, tmp_path):
    """A checkpoint at once, between two periodic ones; then the node is gone."""
    unbroken()
    config = make("notice", run={"checkpoint_every": 100})
    with nodes(2, 2) as two:
        process, trace = drive(config, tmp_path, environment(two), step=4, seconds=8, every_step_s=1.0)
        wait_for(lambda: Path(f"{trace}.4").exists(), process=process)
        node = last_line(trace)["node"]
        drain(two, node, 60)
        noticed = time.monotonic()
        wait_for(lambda: checkpoints(config), process=process)
        took = time.monotonic() - noticed
        (saved,) = checkpoints(config)
        assert 4 <= int(saved.removeprefix("checkpoint_")) < 12, "none is due before the stage's end at 12"
        two.remove_node(node_of(two, node), allow_graceful=False)
        said, _ = process.communicate(timeout=500)
        assert process.returncode == 0, said
    told = story(trace)
    assert told.restarts == 1 and told.lost < 8
    assert_unchanged(config, told)
    record(f"preemption notice, node gone {took:.0f} s after it", "checkpoint at the notice, same weights", told)


GROW = """
import functools, yaml
from pathlib import Path
from ray.train.torch import TorchConfig, TorchTrainer
from hypersd_ray.config.cli import run_job
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.trainer import run
from tests.chaos.faults import broken
run.TorchTrainer = functools.partial(TorchTrainer, torch_config=TorchConfig(backend="gloo"))  # the GPUs are pretended
run.train_loop = broken(Path({trace!r}), {{}})
run_job(lambda: run.train(TSCDConfig.model_validate(yaml.safe_load(Path({config!r}).read_text()))) and 0)
"""


def test_a_cluster_grows_trains_and_shrinks(cluster, make, tmp_path):
    """2 workers with a "GPU" each on an empty cluster; and 3 where 2 is the most."""
    with growing(2, tmp_path) as empty:
        assert empty.gpus() == 0

        def start(name: str, workers: int) -> subprocess.Popen:
            config = make(
                name, run={"workers": workers, "gpus_per_worker": 1, "cpus_per_worker": 1}, optim={"batch": 12}
            )
            write_config(config, tmp_path / f"{name}.yaml")
            code = GROW.format(trace=str(tmp_path / f"{name}.trace"), config=str(tmp_path / f"{name}.yaml"))
            return subprocess.Popen(
                [sys.executable, "-c", code], env=empty.environment, cwd=ROOT,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip

        begun = time.monotonic()
        refused = start("toomany", 3)
        said, _ = refused.communicate(timeout=300)
        told = said.strip().splitlines()[-1]
        assert refused.returncode == 2 and "Traceback" not in said, said
        assert told.startswith("error: run.workers=3 ")
        assert told.endswith("raise max_workers in the cluster's file, or lower run.workers")
        record("3 GPU workers where the autoscaler may have 2", "stopped with one line", None, time.monotonic() - begun)

        begun = time.monotonic()
        process = start("grown", 2)
        assert until(lambda: empty.gpus() == 2, 300), "two nodes came"
        came = time.monotonic() - begun
        said, _ = process.communicate(timeout=900)
        assert process.returncode == 0, said
        lines = [json.loads(line) for line in (tmp_path / "grown.trace").read_text().splitlines()]
        assert {line["world"] for line in lines} == {2} and len({line["node"] for line in lines}) == 2
        assert (folder_of(make("grown")) / "lora" / "tscd-k1.safetensors").exists()
        ended = time.monotonic()
        assert until(lambda: empty.gpus() == 0, 300), "and went"
        gone = time.monotonic() - ended
        record(f"empty cluster grows to 2 GPU nodes ({came:.0f} s) and back to 0 ({gone:.0f} s)", "trained", None, came)
