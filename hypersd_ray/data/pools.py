"""Pools of Ray Data's actors, as settings ask for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
import ray.data

from hypersd_ray.config.data import ActorPool
from hypersd_ray.config.labels import has_labels


def actors(pool: ActorPool, in_flight: int | None = None) -> dict[str, Any]:
    """Arguments of `map_batches`: `pool`'s actors with their resources. Each may hold `in_flight` tasks; None is Ray's choice."""
    return {
        "compute": ray.data.ActorPoolStrategy(
            min_size=pool.min_size, max_size=largest_pool(pool), max_tasks_in_flight_per_actor=in_flight
        ),
        "num_cpus": pool.num_cpus,
        "num_gpus": pool.num_gpus or None,
        "label_selector": pool.label_selector or None,
    }


def largest_pool(pool: ActorPool) -> int:
    """Actors at most: `max_size`, or one for each node that can hold one, or for each share of a GPU that one takes."""
    if pool.max_size is not None:
        return pool.max_size
    nodes = [n for n in ray.nodes() if n["Alive"] and has_labels(n.get("Labels", {}), pool.label_selector)]
    return max(sum(_places(pool, node["Resources"]) for node in nodes), pool.min_size)


def _places(pool: ActorPool, has: Mapping[str, float]) -> int:
    by_cpu = int(has.get("CPU", 0) / pool.num_cpus + 1e-9) if pool.num_cpus else None
    if not pool.num_gpus:
        return 1 if by_cpu is None else min(1, by_cpu)
    gpus = int(has.get("GPU", 0) + 1e-9)
    on_gpus = (
        int(gpus / pool.num_gpus) if pool.num_gpus >= 1 else gpus * int(1 / pool.num_gpus + 1e-9)
    )  # none spans two
    return on_gpus if by_cpu is None else min(on_gpus, by_cpu)
