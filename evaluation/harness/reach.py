"""Whether all nodes see the folder of pictures and scores, and the weights: found out before anything is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from evaluation.harness.judges import JudgeSpec
from evaluation.harness.store import Store, part_of
from evaluation.harness.subjects import Cell
from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.data import ActorPool
from hypersd_ray.config.labels import has_labels
from hypersd_ray.trainer.storage import is_url

Look = Callable[[Sequence[str], Sequence[ActorPool]], dict[str, list[str]]]
"""Paths, the pools of actors -> a node's address -> those of the paths that are not there."""


def missing(paths: Sequence[str]) -> list[str]:
    """Those of `paths` that this machine does not have."""
    return [path for path in paths if not Path(path).exists()]


def missing_elsewhere(paths: Sequence[str], pools: Sequence[ActorPool]) -> dict[str, list[str]]:
    """`missing` on each node of the cluster but this one that may hold an actor of `pools`."""
    here = ray.get_runtime_context().get_node_id()
    others = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] != here and any(_holds(n, pool) for pool in pools)]
    on = lambda node: NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    look = ray.remote(num_cpus=0)(missing)
    asked = [look.options(scheduling_strategy=on(node)).remote(list(paths)) for node in others]
    return {node["NodeManagerAddress"]: found for node, found in zip(others, ray.get(asked), strict=True)}


def _holds(node: Mapping[str, Any], pool: ActorPool) -> bool:
    has = node["Resources"]
    room = has.get("CPU", 0) >= pool.num_cpus and has.get("GPU", 0) >= pool.num_gpus
    return room and has_labels(node.get("Labels", {}), pool.label_selector)


def check_reached(
    store: Store, cells: Sequence[Cell], specs: Sequence[JudgeSpec], pools: Sequence[ActorPool],
    look: Look = missing_elsewhere,
) -> None:  # fmt: skip
    """Every node that may hold an actor sees `store`, where it is a local folder, and has the weights of `cells` and judges where this one has them.

    Raises:
        ConfigError: one does not; one line names the path and the node.
    """
    weights = {path for cell in cells for path in (cell.base, cell.weights) if path}
    for spec in specs:
        settings = json.loads(spec.config)
        weights |= {path for name in ("checkpoint", "tower", "tokenizer") if (path := settings.get(name))}
    marker = Path(part_of(f"{store.root}/seen"))
    paths = sorted(weights)
    try:
        if not is_url(store.out):
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
            paths.insert(0, str(marker))
        found = look(paths, pools)
    except OSError as error:
        raise ConfigError(f"--out {store.out} cannot be written ({error.strerror or error})") from None
    finally:
        marker.unlink(missing_ok=True)
    for node, lost in found.items():
        if str(marker) in lost:
            raise ConfigError(
                f"--out {store.out} is not the same folder on node {node}: name one that all nodes share, or a URL such as "
                "s3://..., or set --where local"
            )
        if lost:
            raise ConfigError(
                f"{lost[0]} is not there on node {node}: put it at the same path on every node, or in a folder that all share"
            )
