"""Where nodes come by need (RAY_AUTOSCALING): wait for the workers' places, or say in one line why they will not come.

Without this a run that asks for more than the autoscaler may start waits for ever: Ray only logs that it is infeasible.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import ray
from ray.core.generated.autoscaler_pb2 import AutoscalingState, GetClusterStatusReply
from ray.util.placement_group import placement_group, remove_placement_group

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.run import RunConfig
from hypersd_ray.trainer.elastic import nodes_now, room

LINE_EVERY_S = 30.0
"""Between lines that say what is waited for."""


@dataclass(frozen=True)
class Autoscaler:
    """What the cluster's autoscaler says: whether its node types and limits can never meet a placement group's request, the
    number of nodes on their way, and why the cloud refused nodes. `speaks` is whether there is one that says anything (v1
    does not)."""

    speaks: bool
    infeasible: bool
    coming: int
    failed: tuple[str, ...] = ()


def autoscaler(group: str) -> Autoscaler:
    """As it stands now, of the placement group with the id `group`, hex; autoscaler v2. Ray has no public name for this."""
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reply = GetClusterStatusReply()
    reply.ParseFromString(client.get_cluster_status())
    return understood(reply.autoscaling_state, group)


def understood(state: AutoscalingState, group: str) -> Autoscaler:
    """What `state` means for the placement group with the id `group`: other jobs' impossible requests are not its own."""
    coming = sum(request.count for request in state.pending_instance_requests) + len(state.pending_instances)
    # details are "<id of the placement group>:<strategy>|<state>"
    infeasible = any(r.details.partition(":")[0] == group for r in state.infeasible_gang_resource_requests)
    failed = tuple(f"{r.ray_node_type_name}: {' '.join(r.reason.split())}" for r in state.failed_instance_requests)
    return Autoscaler(state.autoscaler_state_version > 0, infeasible, coming, failed)


def await_places(run: RunConfig, bundle: dict[str, float]) -> None:
    """Ask for all of the run's workers at once, `bundle` for each, and give the places back to them once they are there.
    Says now and then what is waited for.

    Raises:
        ConfigError: the autoscaler may not start so much, or nothing comes; one line with the settings.
    """
    group = placement_group([bundle] * run.fewest, strategy="PACK")
    ready, begun = group.ready(), time.monotonic()
    quiet_since, said = begun, begun
    try:
        while not ray.wait([ready], timeout=1.0)[0]:
            now = autoscaler(group.id.hex())
            if time.monotonic() - said >= LINE_EVERY_S:
                said = time.monotonic()
                print(waiting_line(run, bundle, now, said - begun), flush=True)
            waits = bool(held(bundle)) and room(nodes_now(), bundle) > 0
            if now.coming or waits:
                quiet_since = time.monotonic()
            quiet = time.monotonic() - quiet_since > run.place_timeout_s
            if quiet and not now.speaks:
                return  # nobody knows whether nodes come: Ray Train waits for them
            # Ray plans with what is free now, so it also calls infeasible what only has to wait for others' work to end.
            if quiet or (now.infeasible and not waits):
                raise ConfigError(_why(run, bundle, now, time.monotonic() - begun))
    finally:
        remove_placement_group(group)


def held(bundle: Iterable[str]) -> dict[str, float]:
    """How much of each resource of `bundle` the cluster's work has taken, where it has any."""
    have, free = ray.cluster_resources(), ray.available_resources()
    taken = {name: have.get(name, 0.0) - free.get(name, 0.0) for name in bundle}
    return {name: amount for name, amount in taken.items() if amount > 1e-9}


def _wanted(run: RunConfig, bundle: dict[str, float]) -> str:
    have = ray.cluster_resources()
    return ", ".join(f"{amount * run.fewest:g} {name} (now {have.get(name, 0):g})" for name, amount in bundle.items())


def waiting_line(run: RunConfig, bundle: dict[str, float], now: Autoscaler, waited: float) -> str:
    """What is waited for since `waited` seconds, and what the autoscaler says of it."""
    refused = f"; {len(now.failed)} were refused, the last {now.failed[-1]:.160}" if now.failed else ""
    nodes = f"{now.coming} on their way{refused}" if now.speaks else "the autoscaler says nothing"
    if others := held(bundle):
        nodes += "; other work has " + ", ".join(f"{amount:g} {name}" for name, amount in others.items())
    return f"waiting for nodes since {waited:.0f} s: {run.fewest} workers need {_wanted(run, bundle)}; {nodes}"


def _why(run: RunConfig, bundle: dict[str, float], now: Autoscaler, waited: float) -> str:
    why = (
        "the autoscaler may not start so many nodes"
        if now.infeasible
        else f"no node came or is on its way in {waited:.0f} s"
        + (f" (the last was refused, {now.failed[-1]:.160})" if now.failed else "")
    )
    return (
        f"{run.fewest_knob}={run.fewest} with run.cpus_per_worker={run.cpus_per_worker:g} and run.gpus_per_worker="
        f"{run.gpus_per_worker:g} need {_wanted(run, bundle)}, and {why}: raise max_workers in the cluster's file, or lower {run.fewest_knob}"
        + ("" if now.infeasible else f" (or raise run.place_timeout_s={run.place_timeout_s:g} where nodes are scarce)")
    )
