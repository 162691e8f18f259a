"""Whether the cluster has room for what a job wants: said in one line, where Ray would wait without a word."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import ray

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.data import ActorPool
from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.config.rewards import PlacementConfig
from hypersd_ray.config.run import RunConfig


def most_there_will_be() -> dict[str, float] | None:
    """Resources of all nodes that an autoscaler may ever have; None where none has said so. It has no public name."""
    from ray._private.state import state

    found = state.get_max_resources_from_cluster_config()
    return None if found is None else {name: float(most) for name, most in found.items()}


def takes(one: RunConfig | PlacementConfig | ActorPool, field: str) -> Iterator[tuple[str, float, str]]:
    """(resource, how much of it a worker or an actor takes, the setting that says so); `field` is the setting that holds `one`."""
    names = ("cpus_per_worker", "gpus_per_worker") if isinstance(one, RunConfig) else ("num_cpus", "num_gpus")
    for resource, name in zip(("CPU", "GPU"), names, strict=True):
        yield resource, getattr(one, name), f"{field}.{name}"


def require(needs: str, wanted: Mapping[str, float], knobs: str) -> None:
    """The cluster has `wanted` ("CPU", "GPU"), or its autoscaler may add it.

    Raises:
        ConfigError: "{needs} need ... the cluster has ...: lower {knobs}".
    """
    have, most = ray.cluster_resources(), most_there_will_be()
    for name, amount in wanted.items():
        there = have.get(name, 0.0)
        if amount <= there + 1e-9:
            continue
        if most is not None and amount > max(there, most.get(name, 0)):
            raise ConfigError(
                f"{needs} need {amount:g} {name}, the cluster's autoscaler adds nodes up to {most.get(name, 0):g}: "
                f"lower {knobs}, or raise max_workers in the cluster's configuration"
            )
        if not os.environ.get("RAY_AUTOSCALING"):
            raise ConfigError(
                f"{needs} need {amount:g} {name}, the cluster has {there:g}: lower {knobs}, or set RAY_AUTOSCALING=1 "
                "where nodes may still come"
            )


def check_workers(run: RunConfig) -> None:
    """The workers of a run that takes nothing beside them.

    Raises:
        ConfigError: one line.
    """
    for name, each, knob in takes(run, "run"):
        require(f"run.workers={run.workers} with {knob}={each:g}", {name: run.workers * each}, f"run.workers or {knob}")


def placement_section(config: FeedbackConfig | OneStepConfig) -> str:
    """What the settings call `config.placement`."""
    return "placement" if isinstance(config, FeedbackConfig) else "feedback.placement"


def check_actors(config: object, beside: Mapping[str, float]) -> None:
    """The shared reward and perception models beside the workers, each of which takes `beside` more than its own place.

    Raises:
        ConfigError: one line.
    """
    if not isinstance(config, FeedbackConfig | OneStepConfig) or config.placement.where != "actors":
        return
    run, placement = config.run, config.placement
    section = placement_section(config)
    actors = len(config.models) * placement.replicas
    for (name, worker, _), (_, actor, knob) in zip(takes(run, "run"), takes(placement, section), strict=True):
        if actor and actors:
            require(
                f"{run.fewest_knob}={run.fewest} and {actors} reward actors with {knob}={actor:g} each",
                {name: run.fewest * (worker + beside[name]) + actors * actor},
                f"run.workers, {knob} or {section}.replicas (or set {section}.where=local)",
            )


def check_pool(pool: ActorPool, field: str, reader_cpus: float = 0.0) -> None:
    """The fewest actors of a pool, and a reading task beside them; `field` is the setting that holds the pool.

    Raises:
        ConfigError: one line.
    """
    for name, each, knob in takes(pool, field):
        beside = reader_cpus if name == "CPU" else 0.0
        needs = f"{field}.min_size={pool.min_size} with {knob}={each:g}"
        if beside:
            needs += f" and a reader with data.reader_cpus={beside:g}"
        require(needs, {name: pool.min_size * each + beside}, knob)
