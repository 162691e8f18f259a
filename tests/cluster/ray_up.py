"""What Ray 2.60 itself makes of a `ray up` file, offline: its checks, its autoscaler's plan, its command line.

Ray keeps all of this private, so it is reached here and nowhere else.
"""

from __future__ import annotations

import copy
import logging
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.event_logger import AutoscalerEventLogger
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest
from ray.core.generated.common_pb2 import LabelSelectorOperator
from ray.scripts import scripts

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"


def load(name: str) -> dict[str, Any]:
    """The file `cluster/{name}.yaml`."""
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """`config` as `ray up` prepares it: defaults filled in, and held against Ray's schema and rules.

    Raises:
        jsonschema.ValidationError, ValueError, AssertionError: what Ray complains of.
    """
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@dataclass(frozen=True)
class Demand:
    """`count` actors, tasks or workers, and the labels they ask for; a `gang` comes together or not at all."""

    count: int
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    gang: bool = False


def plan(
    config: dict[str, Any], *demands: Demand, monitor: CloudResourceMonitor | None = None
) -> tuple[Counter[str], int]:
    """What Ray's autoscaler launches for `demands` on the empty cluster: (node type -> nodes, requests that fit nowhere).

    Args:
        monitor: what the autoscaler has seen of nodes that did not come up.
    """
    logging.getLogger("ray.autoscaler").setLevel(logging.WARNING)
    settings = AutoscalingConfig(checked(config), skip_content_hash=True)
    monitor = monitor or CloudResourceMonitor()
    single: list[Any] = []
    gangs: list[Any] = []
    for demand in demands:
        selector = [[(key, LabelSelectorOperator.LABEL_OPERATOR_IN, [v]) for key, v in demand.labels.items()]]
        request = ResourceRequestUtil.make(dict(demand.resources), label_selectors=selector if demand.labels else None)
        if demand.gang:
            gang = GangResourceRequest(requests=[request] * demand.count)
            gang.bundle_selectors.add().resource_requests.extend(gang.requests)
            gangs.append(gang)
        else:
            single += [request] * demand.count
    reply = ResourceDemandScheduler(AutoscalerEventLogger(logging.getLogger(__name__))).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=settings.get_node_type_configs(),
            max_num_nodes=settings.get_max_num_worker_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(single),
            gang_resource_requests=gangs,
            cloud_resource_availabilities=monitor.get_resource_availabilities(),
            recoverable_resource_availabilities=monitor.get_recoverable_resource_availabilities(),
        )
    )
    nodes: Counter[str] = Counter()
    for launch in reply.to_launch:
        nodes[launch.instance_type] += launch.count
    missing = len(reply.infeasible_resource_requests) + len(reply.infeasible_gang_resource_requests)
    return nodes, missing


def ray_start(commands: Sequence[str]) -> dict[str, Any]:
    """The options of the `ray start` among shell commands, read by Ray's own command line.

    Raises:
        click.ClickException: an option that `ray start` does not have, or a value that it does not take.
    """
    words = shlex.split(" && ".join(commands))
    begin = next(i for i in range(len(words)) if words[i : i + 2] == ["ray", "start"])
    arguments = words[begin + 2 :]
    assert "&&" not in arguments, "`ray start` comes last"
    return scripts.start.make_context("start", arguments).params
