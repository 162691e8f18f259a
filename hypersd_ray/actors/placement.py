"""Start the shared actors, and say in one line why one cannot be placed."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from hypersd_ray.actors.evaluator import EvaluatorActor
from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.labels import has_labels, is_operator
from hypersd_ray.config.rewards import PerceptionConfig, PlacementConfig, RewardConfig

Handles = dict[str, list[ray.actor.ActorHandle]]
"""Model name -> its replicas."""


def start_evaluators(
    models: Sequence[RewardConfig | PerceptionConfig], placement: PlacementConfig, run: str, section: str = "placement"
) -> Handles:
    """An actor (or `placement.replicas`) for each model, placed and loaded. `section` is what the settings call `placement`.

    They end with the driver that called this. Each is found by name too, `{run}/{model}/{replica}`.

    Raises:
        ConfigError: no node can hold one, with the resource that is missing and the setting to change, within
            `placement.place_timeout_s`.
        ValueError: a checkpoint cannot be loaded.
    """
    check_placeable(placement, section)
    handles: Handles = {}
    for model in models:
        handles[model.name] = [_start(model, placement, f"{run}/{model.name}/{i}") for i in range(placement.replicas)]
    try:
        _await_places(handles, placement, section)
        _await_models(handles, placement, section)
    except BaseException:
        stop_evaluators(handles)
        raise
    return handles


def _start(model: RewardConfig | PerceptionConfig, placement: PlacementConfig, name: str) -> ray.actor.ActorHandle:
    options: dict[str, Any] = {"label_selector": placement.label_selector} if placement.label_selector else {}
    if isinstance(model, RewardConfig) and model.python:
        options["runtime_env"] = {"py_executable": model.python}
    return EvaluatorActor.options(  # type: ignore[attr-defined]
        name=name,
        get_if_exists=True,
        num_cpus=placement.num_cpus,
        num_gpus=placement.num_gpus,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=256,
        **options,
    ).remote(model, placement)


def check_placeable(placement: PlacementConfig, section: str = "placement") -> None:
    """Raises ConfigError when no node, however empty, could hold one actor. How many there are is trainer/room.py's.

    Where nodes may still come (RAY_AUTOSCALING), that is not known before `placement.place_timeout_s`.
    """
    if os.environ.get("RAY_AUTOSCALING"):
        return
    wanted = {"GPU": placement.num_gpus, "CPU": placement.num_cpus}
    nodes = [n for n in ray.nodes() if n["Alive"]]
    labelled = [n for n in nodes if has_labels(n.get("Labels", {}), placement.label_selector)]
    if nodes and not labelled:
        raise ConfigError(
            f"no node has the labels {section}.label_selector={placement.label_selector}: "
            f"change it, or place the models with {section}.where=local"
        )
    for name, amount in wanted.items():
        most = max((n["Resources"].get(name, 0.0) for n in labelled), default=0.0)
        if amount > most:
            raise ConfigError(
                f"a reward actor wants {amount:g} {name} ({section}.num_{name.lower()}s), the largest node has {most:g}: "
                f"lower {section}.num_{name.lower()}s, or set {section}.where=local"
            )


def _await_places(handles: Handles, placement: PlacementConfig, section: str) -> None:
    """Every actor answers. One that is late though a node has room for it is only slow to start, and is waited for."""
    pings = {h.ping.remote(): f"{name} {i}" for name, replicas in handles.items() for i, h in enumerate(replicas)}
    late = list(pings)
    begun = time.monotonic()
    while late and time.monotonic() - begun < placement.load_timeout_s:
        _, late = ray.wait(late, num_returns=len(late), timeout=placement.place_timeout_s)
        if late and not _has_room(placement):
            break
    for ref in pings.keys() - set(late):
        try:
            ray.get(ref)
        except (RayActorError, RayTaskError) as error:
            raise ConfigError(f"reward actor {pings[ref]} did not start: {_first_line(error)}") from None
    if late:
        free, every = ray.available_resources(), ray.cluster_resources()
        have = ", ".join(f"{free.get(k, 0):g} of {every.get(k, 0):g} {k}" for k in ("CPU", "GPU"))
        where = f" on a node of {section}.label_selector={placement.label_selector}" if placement.label_selector else ""
        raise ConfigError(
            f"{len(late)} of {len(pings)} reward actors found no place in {time.monotonic() - begun:.0f} s "
            f"({pings[late[0]]} wants {placement.num_cpus:g} CPU and {placement.num_gpus:g} GPU{where}; free are "
            f"{have}): lower {section}.num_gpus, {section}.num_cpus or run.workers, set {section}.where=local, or raise "
            f"{section}.place_timeout_s where nodes still come"
        )


def _has_room(placement: PlacementConfig) -> bool:
    """Whether some node could take one more actor now. Where only Ray's scheduler knows which nodes may (operators), none
    is said to: `placement.place_timeout_s` is the limit then."""
    selector = placement.label_selector
    if any(map(is_operator, selector.values())):
        return False
    labelled = {n["NodeID"] for n in ray.nodes() if n["Alive"] and has_labels(n.get("Labels", {}), selector)}
    return any(
        node in labelled and free.get("CPU", 0) >= placement.num_cpus and free.get("GPU", 0) >= placement.num_gpus
        for node, free in available_resources_per_node().items()
    )


def _await_models(handles: Handles, placement: PlacementConfig, section: str) -> None:
    loads = {h.load.remote(): name for name, replicas in handles.items() for h in replicas}
    for ref, name in loads.items():
        try:
            ray.get(ref, timeout=placement.load_timeout_s)
        except GetTimeoutError:
            raise ConfigError(
                f"{name} was not loaded after {section}.load_timeout_s={placement.load_timeout_s:g} s: raise it"
            ) from None
        except RayTaskError as error:
            raise ValueError(f"{name}: {_first_line(error.cause)}") from None
        except RayActorError as error:
            raise ValueError(f"{name}: its actor died while it loaded: {_first_line(error)}") from None


def _first_line(error: BaseException | None) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def stop_evaluators(handles: Handles) -> None:
    """End all of them."""
    for replicas in handles.values():
        for handle in replicas:
            ray.kill(handle)
