"""Pools of Ray Data's actors, as settings ask for them."""

from __future__ import annotations

from typing import Any

import ray
import ray.data

from hypersd_ray.config.data import EncoderPool


def actors(pool: EncoderPool, in_flight: int | None = None) -> dict[str, Any]:
    """Arguments of `map_batches`: `pool`'s actors with their resources. Each may hold `in_flight` tasks; None is Ray's choice."""
    return {
        "compute": ray.data.ActorPoolStrategy(
            min_size=pool.min_size, max_size=most(pool), max_tasks_in_flight_per_actor=in_flight
        ),
        "num_cpus": pool.num_cpus,
        "num_gpus": pool.num_gpus or None,
        "label_selector": pool.label_selector or None,
    }


def most(pool: EncoderPool) -> int:
    """Actors at most: `max_size`, or one for each node that can hold one, or for each share of a GPU that one takes."""
    if pool.max_size is not None:
        return pool.max_size
    room = 0
    for node in ray.nodes():
        has, labels = node["Resources"], node.get("Labels", {})
        if not node["Alive"] or any(labels.get(name) != value for name, value in pool.label_selector.items()):
            continue
        if pool.num_gpus:
            room += int(has.get("GPU", 0) / pool.num_gpus + 1e-9)
        else:
            room += has.get("CPU", 0) >= pool.num_cpus
    return max(room, pool.min_size)
