"""A number of workers that follows the nodes (run.min_workers): how many have room, and no step lost where more get some."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState, SchedulingState

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.run import RunConfig
from hypersd_ray.trainer.kinds import AnyConfig
from hypersd_ray.trainer.local import environment

START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""Ray Train's: seconds that a group's places are waited for before their number is settled anew."""
FIXED_S, OPEN_S = 600, 25
"""Of a fixed number of workers, for which asking again changes nothing; of an open one: Ray hears of a node that went up to
20 s late, asks for a place on it until then, and must not wait for that one."""


def place_of(config: AnyConfig) -> dict[str, float]:
    """What a worker needs on one node. Where their number is open Ray Train divides nodes by this alone, so the readers' share
    is in it: else they would find no room."""
    run = config.run
    readers = 0.0 if run.min_workers is None else config.data.reader_cpus
    each = {"CPU": run.cpus_per_worker + readers, "GPU": run.gpus_per_worker}
    return {name: amount for name, amount in each.items() if amount}


def room(nodes: Sequence[Mapping[str, float]], place: Mapping[str, float]) -> int:
    """Places on `nodes` (resources of each), none of them across two."""
    if not place:
        return sys.maxsize
    return sum(min(int(node.get(n, 0.0) / amount + 1e-9) for n, amount in place.items()) for node in nodes)


def nodes_now() -> list[dict[str, float]]:
    """All resources of each node that is alive, taken or not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def check_room(config: AnyConfig) -> None:
    """The nodes have room for the fewest workers that the run needs: Ray Train would wait without a word.

    Raises:
        ConfigError: how many have, and the settings.
    """
    run, place = config.run, place_of(config)
    found = room(nodes_now(), place)
    if found < run.fewest:
        each = " and ".join(f"{amount:g} {name}" for name, amount in place.items())
        readers = ", data.reader_cpus" if run.min_workers is not None else ""
        raise ConfigError(
            f"{run.fewest_knob}={run.fewest}: the nodes have room for {found} workers of {each} on one node "
            f"(run.cpus_per_worker, run.gpus_per_worker{readers}): lower one of these, or set RAY_AUTOSCALING=1 where nodes "
            "may still come"
        )


@contextmanager
def start_timeout(run: RunConfig) -> Iterator[None]:
    """Ray Train reads it in `fit` and hands it to its controller; one that is set already stays."""
    with environment({START_TIMEOUT: str(FIXED_S if run.min_workers is None else OPEN_S)}):
        yield


@contextmanager
def room_told(config: AnyConfig, board: ray.actor.ActorHandle, every_s: float = 10.0) -> Iterator[None]:
    """A line when the nodes have no room for run.min_workers any more, for as long as the block lasts."""
    fewest = config.run.min_workers
    if fewest is None:
        yield
        return
    place, ended = place_of(config), threading.Event()

    def look() -> None:
        told = None
        while not ended.wait(every_s):
            found = room(nodes_now(), place)
            if found < fewest and found != told:
                board.tell.remote(f"room for {found} of at least {fewest} workers (run.min_workers): waiting for nodes")
            told = found if found < fewest else None

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class SaveBeforeResize(ControllerCallback):
    """Ray Train's controller kills a group whose size changes, and tells nobody before: this makes it wait for a checkpoint.

    Without it each change would cost the steps since the last checkpoint, and nodes that join faster than there are
    checkpoints all progress.
    """

    def __init__(self, board: ray.actor.ActorHandle, patience_s: float):
        self.board, self.patience_s, self.alive = board, patience_s, False

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Only a group that is resized, not one that failed, can still save."""
        if isinstance(current_state, SchedulingState):
            self.alive = isinstance(previous_state, ResizingState)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Wait until all workers have saved, `patience_s` at most."""
        if not self.alive:
            return
        with contextlib.suppress(ray.exceptions.RayError):  # what is raised here would count as a failure of the run
            ray.get(self.board.ask_to_save.remote())
            until = time.monotonic() + self.patience_s
            while not ray.get(self.board.all_saved.remote()) and time.monotonic() < until:
                time.sleep(0.1)
            ray.get(self.board.save_no_more.remote())
