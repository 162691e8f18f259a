"""Clusters of several nodes on one machine. All of Ray's private parts that the chaos tests need are reached here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from tests.jobs.conftest import ROOT, _stop, free_ports, ray_command, serves

HEAD = "f" * 51 + "00000"
"""The fake provider's own id of the head."""


@contextmanager
def nodes(*cpus: float) -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster`: a head without CPUs, where drivers are, and a node of each number of CPUs."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for number in cpus:
            cluster.add_node(num_cpus=number)
        yield cluster
    finally:
        cluster.shutdown()


def environment(cluster: Any) -> dict[str, str]:
    """Of a driver that joins."""
    return os.environ | {
        "RAY_ADDRESS": cluster.address, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
    }  # fmt: skip


def node_of(cluster: Any, node_id: str) -> Any:
    """By its id."""
    return next(n for n in cluster.worker_nodes if n.node_id == node_id)


def alive_actors(name: str) -> int:
    """Actors of that class, of any driver on this process's cluster."""
    from ray._private.state import actors

    return sum(a["State"] == "ALIVE" and a["ActorClassName"].split(".")[-1] == name for a in actors().values())


def drain(cluster: Any, node_id: str, seconds: float) -> None:
    """The notice that a cloud gives before it takes a spot node away."""
    client = ray._raylet.GcsClient(address=cluster.address)
    deadline = int((time.time() + seconds) * 1000)
    client.drain_node(node_id, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot", deadline)


@dataclass(frozen=True)
class Growing:
    """A cluster that grows: its GCS address, its dashboard, and the environment of a driver."""

    address: str
    dashboard: str
    environment: dict[str, str]

    def gpus(self) -> float:
        """Of the nodes that are alive now."""
        with urllib.request.urlopen(f"{self.dashboard}/api/v0/nodes", timeout=20) as answer:
            listed = json.load(answer)["data"]["result"]["result"]
        return sum(n["resources_total"].get("GPU", 0.0) for n in listed if n["state"] == "ALIVE")


@contextmanager
def growing(gpu_nodes: int, home: Path) -> Iterator[Growing]:
    """Ray's autoscaler v2 over the fake provider: no worker at first, up to `gpu_nodes` nodes of 2 CPUs and 1 "GPU"."""
    temporary = Path(tempfile.mkdtemp(prefix="rg", dir="/tmp"))
    ports = dict(zip(("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port",
                      "dashboard-agent-grpc-port", "metrics-export-port"), free_ports(6), strict=True))  # fmt: skip
    address, dashboard = f"127.0.0.1:{ports['port']}", f"http://127.0.0.1:{ports['dashboard-port']}"
    config = {
        "cluster_name": "growing", "max_workers": gpu_nodes, "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external", "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address, "launch_multiple": True, "head_node_id": HEAD, "use_node_id_as_ip": True,
            "disable_node_updaters": True, "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": {"CPU": 2, "GPU": 1, "object_store_memory": 10**8}, "node_config": {},
                    "min_workers": 0, "max_workers": gpu_nodes},
        },
        "head_node_type": "ray.head.default", "upscaling_speed": 20,
        "auth": {}, "docker": {}, "initialization_commands": [], "setup_commands": [], "head_setup_commands": [],
        "worker_setup_commands": [], "head_start_ray_commands": [], "worker_start_ray_commands": [], "file_mounts": {},
        "cluster_synced_files": [], "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
    }  # fmt: skip
    (temporary / "autoscaling.yaml").write_text(json.dumps(config))
    variables = {n: v for n, v in os.environ.items() if n not in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")} | {
        "RAY_TMPDIR": str(temporary), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(home),
        "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
    }  # fmt: skip
    log = (temporary / "head.log").open("w")
    head = subprocess.Popen(
        [ray_command(), "start", "--head", "--block", "--num-cpus=0", "--include-dashboard=true",
         "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={temporary}",
         f"--autoscaling-config={temporary / 'autoscaling.yaml'}", *(f"--{n}={port}" for n, port in ports.items())],
        cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 300
        while not serves(f"{dashboard}/api/jobs/"):
            assert head.poll() is None and time.monotonic() < until, (temporary / "head.log").read_text()
            time.sleep(0.5)
        driver = {
            n: v for n, v in variables.items() if n not in ("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING")
        }
        yield Growing(address, dashboard, driver | {"RAY_ADDRESS": address, "RAY_AUTOSCALING": "1"})
    finally:
        _stop(head, temporary)
        log.close()
        shutil.rmtree(temporary, ignore_errors=True)
