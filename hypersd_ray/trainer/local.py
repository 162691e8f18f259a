"""A Ray of this machine's own, where no cluster is named."""

from __future__ import annotations

import os
import socket
from typing import Any

import ray

from hypersd_ray.trainer.progress import stderr_held


def start_local(dashboard: bool = False) -> None:
    """Start one that says little, with its dashboard where that is needed."""
    # On one's own machine the bar says what there is to say; what the processes print is in Ray's session logs, and
    # what fails comes back as an exception. Level "fatal" is for warnings of Ray's C++ side about its own actors.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Else two at a time, and a warning when eight wait: Ray Train and Ray Data need a dozen to start.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    # Ray's workers are at nice 15: one busy program on one of two cores would then stop a training that uses both.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # At least 4 logical CPUs: a reader, an encoder and a worker must be able to stand side by side.
    with stderr_held():  # a line of Ray's that it has read the level above
        ray.init(
            "local",  # else Ray joins what `ray start` left on this machine, and refuses the number of CPUs
            num_cpus=max(4, os.cpu_count() or 1),
            logging_level="ERROR",
            log_to_driver=False,
            **(dashboard_options() if dashboard else {"include_dashboard": False}),
        )


def dashboard_options() -> dict[str, Any]:
    """Of ray.init, for a dashboard that this process and Ray's find. Ray's state API asks the first Ray of the machine that it
    sees, if the environment names none."""
    port = free_port()
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    return {"include_dashboard": True, "dashboard_port": port}


def free_port() -> int:
    """Of the loopback, for now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
