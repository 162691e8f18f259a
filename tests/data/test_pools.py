"""How many actors a pool may have."""

from __future__ import annotations

import pytest
import ray

from hypersd_ray.config.data import ActorPool
from hypersd_ray.data import pools


def node(alive: bool = True, labels: dict[str, str] | None = None, **resources: float) -> dict:
    return {"Alive": alive, "Resources": resources, "Labels": labels or {}}


@pytest.fixture
def nodes(monkeypatch):
    """Ray's own list has one node of this machine: three kinds of it stand in here."""
    there = [
        node(CPU=8.0, GPU=2.0, labels={"pool": "a"}), node(CPU=4.0, labels={"pool": "b"}), node(CPU=0.5),
        node(alive=False, CPU=64.0, GPU=8.0),
    ]  # fmt: skip
    monkeypatch.setattr(ray, "nodes", lambda: there)


@pytest.mark.parametrize(
    ("pool", "most"),
    [
        (ActorPool(max_size=None), 2),
        (ActorPool(max_size=None, num_cpus=0.5), 3),
        (ActorPool(max_size=None, num_cpus=6), 1),
        (ActorPool(max_size=None, num_gpus=1), 2),
        (ActorPool(max_size=None, num_gpus=0.1, num_cpus=0), 20),
        (ActorPool(max_size=None, num_gpus=0.1), 8),
        (ActorPool(max_size=None, num_gpus=0.4), 4),
        (ActorPool(max_size=None, num_gpus=2), 1),
        (ActorPool(max_size=None, label_selector={"pool": "!c"}), 2),
        (ActorPool(max_size=None, label_selector={"pool": "b"}), 1),
        (ActorPool(max_size=None, min_size=4), 4),
        (ActorPool(max_size=None, label_selector={"pool": "none yet"}), 1),
        (ActorPool(), 1),
        (ActorPool(max_size=7), 7),
    ],
)
def test_one_a_node_or_a_share_of_a_gpu_unless_told(nodes, pool, most):
    assert pools.largest_pool(pool) == most and pools.actors(pool)["compute"].max_size == most


@pytest.mark.cluster
def test_ray_has_as_many_nodes_as_are_counted(ray_cluster):
    """The names of the columns are Ray's."""
    wanted = sum(one["Alive"] and one["Resources"].get("CPU", 0) >= 1 for one in ray.nodes())
    assert pools.largest_pool(ActorPool(max_size=None)) == max(wanted, 1)
    name = ray.nodes()[0]["NodeID"]
    assert pools.largest_pool(ActorPool(max_size=None, label_selector={"ray.io/node-id": name})) == 1
