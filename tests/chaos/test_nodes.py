"""Nodes that go, with and without a notice, and a cluster that grows from nothing and shrinks to nothing."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.chaos.clusters import drain, environment, growing, node_of, nodes
from tests.chaos.conftest import BATCH, EVERY
from tests.chaos.faults import checkpoints, record, story, until, worlds
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
        left = time.monotonic()
        two.remove_node(node_of(two, node), allow_graceful=False)
        gone = time.monotonic() - left
        said, _ = process.communicate(timeout=500)
        assert process.returncode == 0, said
    told = story(trace)
    # A step takes a second or more: none is made again but what was trained between the checkpoint and the node's end.
    assert told.restarts == 1 and told.lost <= gone + 2
    assert_unchanged(config, told)
    record(f"preemption notice, node gone {took:.0f} s after it", "checkpoint at the notice, same weights", told)


def test_the_number_of_workers_follows_the_nodes(cluster, make, tmp_path):
    """One worker; a node joins: two; it goes: one again. Each epoch's samples are trained once."""
    # Ray hears of a node up to 20 s after it came: 30 steps of 2 s, five epochs.
    config = make(
        "elastic", run={"workers": 2, "min_workers": 1, "resize_every_s": 2}, distill={"steps_list": (20, 10)}
    )

    def steps_of_two() -> int:
        lines = [json.loads(line) for line in trace.read_text().splitlines()] if trace.exists() else []
        return len({line["step"] for line in lines if line["world"] == 2})

    with nodes(2) as growing_one:
        process, trace = drive(config, tmp_path, environment(growing_one), step=4, seconds=2, every_step_s=2)
        wait_for(lambda: Path(f"{trace}.4").exists(), process=process)
        second = growing_one.add_node(num_cpus=2, wait=False)
        wait_for(lambda: steps_of_two() >= EVERY + 2, process=process)
        growing_one.remove_node(second, allow_graceful=False)
        said, _ = process.communicate(timeout=500)
        assert process.returncode == 0, said
    told, trained = story(trace), worlds(trace)
    assert sorted(trained) == list(range(1, 31))
    sizes = [len(trained[step]) for step in sorted(trained)]
    assert sizes[0] == sizes[-1] == 1 and 2 in sizes, sizes
    assert all(sum(map(len, ranks)) == BATCH for ranks in trained.values())
    counts = Counter(key for ranks in trained.values() for own in ranks for key in own)
    assert len(counts) == 24 and max(counts.values()) - min(counts.values()) <= 1, "five epochs, the ranks side by side"
    joined = next(
        b["step"] - a["step"] for a, b in itertools.pairwise(firsts(trace)) if (a["world"], b["world"]) == (1, 2)
    )
    assert joined == 1, "a node that joins costs no step"
    assert told.restarts == 2 and told.lost <= EVERY + 1
    numbers = ", ".join(f"{size} at steps {a} to {b}" for size, a, b in runs_of(sizes))
    record(
        f"a node joins and goes, run.min_workers=1 (workers: {numbers})",
        "the number of workers followed; each sample once an epoch",
        told,
    )


def firsts(trace: Path) -> list[dict]:
    """Rank 0's lines."""
    return [line for line in map(json.loads, trace.read_text().splitlines()) if line["rank"] == 0]


def runs_of(sizes: list[int]) -> list[tuple[int, int, int]]:
    """(size, first step, last step) of each stretch of one size."""
    found, at = [], 1
    for size, group in itertools.groupby(sizes):
        count = len(list(group))
        found.append((size, at, at + count - 1))
        at += count
    return found


GROW = """
import functools, yaml
from pathlib import Path
from ray.train.torch import TorchConfig
from hypersd_ray.config.cli import run_job
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.trainer import run
from tests.chaos.faults import broken
run.Trainer = functools.partial(run.Trainer, torch_config=TorchConfig(backend="gloo"))  # the GPUs are pretended
run.train_loop = broken(Path({trace!r}), {{}})
run_job(lambda: run.train(TSCDConfig.model_validate(yaml.safe_load(Path({config!r}).read_text()))) and 0)
"""


ASK_FOR_TOO_MUCH = """
import time, ray
from ray.util.placement_group import placement_group
ray.init(logging_level="ERROR")
group = placement_group([{"GPU": 1}] * 50)
print("asked", flush=True)
time.sleep(3600)
"""


@contextmanager
def asking_for_too_much(variables: dict[str, str]) -> Iterator[None]:
    """Another job, whose request the autoscaler can never meet."""
    other = subprocess.Popen([sys.executable, "-c", ASK_FOR_TOO_MUCH], env=variables, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "asked\n"
        yield
    finally:
        other.kill()
        other.wait()


def test_a_cluster_grows_trains_and_shrinks(cluster, make, tmp_path):
    """4 workers with a "GPU" each on an empty cluster, whatever another job asks for; the same again beside them, which wait
    for these; and 5 where 4 is the most, refused within a minute."""
    with growing(4, tmp_path) as empty:
        assert empty.gpus() == 0

        def start(name: str, workers: int) -> subprocess.Popen:
            config = make(
                name, run={"workers": workers, "gpus_per_worker": 1, "cpus_per_worker": 1}, optim={"batch": 20}
            )
            write_config(config, tmp_path / f"{name}.yaml")
            code = GROW.format(trace=str(tmp_path / f"{name}.trace"), config=str(tmp_path / f"{name}.yaml"))
            return subprocess.Popen(
                [sys.executable, "-c", code], env=empty.environment, cwd=ROOT,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip

        begun = time.monotonic()
        refused = start("toomany", 5)
        said, _ = refused.communicate(timeout=300)
        told = said.strip().splitlines()[-1]
        assert refused.returncode == 2 and "Traceback" not in said, said
        took = time.monotonic() - begun
        assert told.startswith("error: run.workers=5 ") and took < 60
        assert told.endswith("raise max_workers in the cluster's file, or lower run.workers")
        record("5 GPU workers where the autoscaler may have 4", "stopped with one line", None, took)

        with asking_for_too_much(empty.environment):
            begun = time.monotonic()
            process = start("grown", 4)
            assert until(lambda: empty.gpus() == 4, 300), "four nodes came"
            came = time.monotonic() - begun
        queued = start("queued", 4)  # the autoscaler calls what has to wait for others infeasible
        said, _ = process.communicate(timeout=900)
        assert process.returncode == 0, said
        said, _ = queued.communicate(timeout=900)
        assert queued.returncode == 0, said
        record("4 GPU workers while another job has all that the autoscaler may start", "waited for it, trained", None)
        lines = [json.loads(line) for line in (tmp_path / "grown.trace").read_text().splitlines()]
        assert {line["world"] for line in lines} == {4} and len({line["node"] for line in lines}) == 4
        assert (folder_of(make("grown")) / "lora" / "tscd-k1.safetensors").exists()
        ended = time.monotonic()
        assert until(lambda: empty.gpus() == 0, 300), "and went"
        gone = time.monotonic() - ended
        record(f"empty cluster grows to 4 GPU nodes ({came:.0f} s) and back to 0 ({gone:.0f} s)", "trained", None, came)
