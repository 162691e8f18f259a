"""Where nodes come by need (RAY_AUTOSCALING): wait for the workers' places, or say in one line why they will not come.

Without this a run that asks for more than the autoscaler may start waits for ever: Ray only logs that it is infeasible.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import ray
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.util.placement_group import placement_group, remove_placement_group

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.run import RunConfig


@dataclass(frozen=True)
class Autoscaler:
    """What the cluster's autoscaler says: requests that its node types and limits can never meet, and nodes on their way.
    `speaks` is whether there is one that says anything (v1 does not)."""

    speaks: bool
    infeasible: int
    coming: int


def autoscaler() -> Autoscaler:
    """As it stands now; autoscaler v2. Ray has no public name for this."""
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reply = GetClusterStatusReply()
    reply.ParseFromString(client.get_cluster_status())
    state = reply.autoscaling_state
    coming = sum(request.count for request in state.pending_instance_requests) + len(state.pending_instances)
    return Autoscaler(state.autoscaler_state_version > 0, len(state.infeasible_gang_resource_requests), coming)


def await_places(run: RunConfig, bundle: dict[str, float]) -> None:
    """Ask for all of the run's workers at once, `bundle` for each, and give the places back to them once they are there.

    Raises:
        ConfigError: the autoscaler may not start so much, or nothing comes; one line with the settings.
    """
    group = placement_group([bundle] * run.fewest, strategy="PACK")
    ready, quiet_since, begun = group.ready(), time.monotonic(), time.monotonic()
    try:
        while not ray.wait([ready], timeout=1.0)[0]:
            now = autoscaler()
            if now.coming:
                quiet_since = time.monotonic()
            quiet = time.monotonic() - quiet_since > run.place_timeout_s
            if quiet and not now.speaks:
                return  # nobody knows whether nodes come: Ray Train waits for them
            if now.infeasible or quiet:
                raise ConfigError(_why(run, bundle, now, time.monotonic() - begun))
    finally:
        remove_placement_group(group)


def _why(run: RunConfig, bundle: dict[str, float], now: Autoscaler, waited: float) -> str:
    have = ray.cluster_resources()
    wanted = ", ".join(f"{amount * run.fewest:g} {name} (now {have.get(name, 0):g})" for name, amount in bundle.items())
    why = (
        "the autoscaler may not start so many nodes"
        if now.infeasible
        else f"no node came or is on its way in {waited:.0f} s"
    )
    return (
        f"{run.fewest_knob}={run.fewest} with run.cpus_per_worker={run.cpus_per_worker:g} and run.gpus_per_worker="
        f"{run.gpus_per_worker:g} need {wanted}, and {why}: raise max_workers in the cluster's file, or lower {run.fewest_knob}"
        + ("" if now.infeasible else f" (or raise run.place_timeout_s={run.place_timeout_s:g} where nodes are scarce)")
    )
