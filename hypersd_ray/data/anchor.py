"""Where Ray Data's own actors live."""

from __future__ import annotations

import logging

import ray.data


def anchor() -> None:
    """Let the first execution on this cluster be one of this process.

    Ray Data keeps detached actors (statistics, its autoscaling coordinator), made by whoever executes first, on that
    process's node: a training worker's node would never be idle again, so the autoscaler would never take it away. One row,
    without a core; where the actors are already, it changes nothing.
    """
    logger = logging.getLogger("ray.data")
    before = logger.level
    logger.setLevel(logging.ERROR)  # "does not have any available CPUs": it needs none
    try:
        dataset = ray.data.from_items([{"anchor": 0}])
        dataset.context.enable_progress_bars = False
        dataset.map_batches(lambda batch: batch, num_cpus=0).materialize()
    finally:
        logger.setLevel(before)
