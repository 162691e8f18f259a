"""What each of Ray Train's workers does around its training, whatever it trains."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import ray.train
import torch

from hypersd_ray.config.base import CombinationError, RunError
from hypersd_ray.trainer.local import step_first
from hypersd_ray.trainer.storage import StorageError


def device_of_worker(runs_per_node: int = 1) -> torch.device:
    """Where this worker computes; on CPUs with its share of the node's cores as threads, of `runs_per_node` runs at a time."""
    device: torch.device = ray.train.torch.get_device()
    if device.type == "cpu":
        # Ray gives a worker one OpenMP thread per reserved CPU; nobody but other runs computes while it steps.
        computing = ray.train.get_context().get_local_world_size() * runs_per_node
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // computing))
    step_first()
    return device


@contextmanager
def failures_told(board: ray.actor.ActorHandle) -> Iterator[None]:
    """What ends the block, and would end it the same way every time (a user's mistake, a run of NaN), goes to the board.

    Ray starts a group again whatever a worker raises. So the workers return instead, and the driver has the reason, without
    Ray's traceback.
    """
    alone = ray.train.get_context().get_world_size() == 1
    try:
        yield
    except RunError as error:
        ray.get(board.stop.remote(error))
        if isinstance(error, StorageError) and not alone:
            raise  # the others are on all ranks at once
    except (ValueError, CombinationError) as error:
        traceback.print_exc()  # into the worker's log
        cause = getattr(error, "cause", None) or error  # out of Ray Data it is wrapped, with all of its traceback
        ray.get(board.stop.remote(RunError(" ".join(str(cause).split()))))
        if not alone:
            raise  # the other ranks may be waiting for this one; the next group returns at once
