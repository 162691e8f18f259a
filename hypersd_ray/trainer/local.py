"""A Ray of this machine's own, where no cluster is named."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray

from hypersd_ray.trainer.progress import stderr_held

BACKEND = {
    # On one's own machine the bar says what there is to say; what the processes print is in Ray's session logs, and
    # what fails comes back as an exception. Level "fatal" is for warnings of Ray's C++ side about its own actors.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # Else two at a time, and a warning when eight wait: Ray Train and Ray Data need a dozen to start.
    "RAY_worker_maximum_startup_concurrency": "16",
    # Ray's workers are at nice 15: one busy program on one of two cores would then stop a training that uses both.
    "RAY_worker_niceness": "0",
}
"""What Ray's processes find in their environment, where the user has not said otherwise."""
UNSEEN = {"REPORTER_UPDATE_INTERVAL_MS": "60000", "RAY_task_events_report_interval_ms": "0"}
"""The same, where there is no dashboard: statistics that nobody sees, taken from the cores that train."""
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Ray Train's switch for the actor that looks for nodes that will be taken away."""
_started = False


def start_local(dashboard: bool = False) -> None:
    """Start one that says little, with its dashboard where that is needed."""
    global _started
    _started = True
    variables = BACKEND if dashboard else BACKEND | UNSEEN
    # At least 4 logical CPUs: a reader, an encoder and a worker must be able to stand side by side.
    # Held is a line of Ray's that it has read the level above.
    with environment(variables), _batch_scheduling(), stderr_held():
        ray.init(
            "local",  # else Ray joins what `ray start` left on this machine, and refuses the number of CPUs
            num_cpus=max(4, os.cpu_count() or 1),
            logging_level="ERROR",
            log_to_driver=False,
            **(dashboard_options() if dashboard else {"include_dashboard": False}),
        )


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Those that are not set already, for what is started meanwhile."""
    missing = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ |= missing
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


@contextmanager
def _batch_scheduling() -> Iterator[None]:
    """What is started meanwhile waits for its turn, and does not interrupt the training when it wakes.

    Each of Ray's two dozen processes wakes a hundred times a second to look for signals. Where the workers fill the cores,
    every one of these would push a worker off its core; Linux's SCHED_BATCH gives them as much time, and not at once.
    `step_first` takes a worker out of it.
    """
    if not hasattr(os, "SCHED_BATCH") or os.sched_getscheduler(0) != os.SCHED_OTHER:  # not Linux; the user's own choice
        yield
        return
    _schedule("SCHED_BATCH")
    try:
        yield
    finally:
        _schedule("SCHED_OTHER")


def step_first() -> None:
    """Take this thread, and those that it starts, out of the class that `_batch_scheduling` gave to all of Ray's."""
    if hasattr(os, "SCHED_BATCH") and os.sched_getscheduler(0) == os.SCHED_BATCH:
        _schedule("SCHED_OTHER")


@contextmanager
def unwatched() -> Iterator[None]:
    """Runs that begin meanwhile on a Ray of `start_local` do not ask every few seconds whether their node will go: it is this
    machine."""
    with environment({WATCHER: "0"} if _started else {}):  # Ray Train hands it to its controller and workers
        yield


def watched() -> bool:
    """In a worker: whether somebody watches for nodes that will go."""
    return os.environ.get(WATCHER) != "0"


def _schedule(policy: str) -> None:
    """This thread; nothing where a sandbox does not let it."""
    with suppress(OSError):
        os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))


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
