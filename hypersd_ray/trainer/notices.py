"""What a worker hears between two steps: that the job is to stop, that a node will be taken away, that others will go on.

All workers must do the same after the same step, so each tells what it has heard and the most urgent counts: one collective
of four bytes.
"""

from __future__ import annotations

import math
import time
from enum import IntEnum

import ray
import ray.train
import torch

from hypersd_ray.trainer.local import watched
from hypersd_ray.training.distributed import max_over_workers


class Notice(IntEnum):
    """From what is least urgent: the greatest of the workers' counts, and it travels as its number."""

    NOTHING = 0
    LOOK = 1
    """Rank 0 found that it is time to ask for nodes that will go; never returned."""
    SAVE = 2
    """A checkpoint now: a node will go."""
    MOVE = 3
    """A checkpoint now: others go on from it. Said once."""
    STOP = 4
    """A checkpoint now, and return."""


class Notices:
    """Asked once a step by every worker; nobody waits for an answer over the network but every `PREEMPTION_S` seconds."""

    STOP_S, PREEMPTION_S = 0.5, 5.0  # Ray itself asks for drained nodes every 5 s
    LAST_CALL_S = 20.0
    """Before a node goes there is a second checkpoint, for the steps since its notice, which may be two minutes old by then."""

    def __init__(self, board: ray.actor.ActorHandle, rank: int, device: torch.device):
        self.board, self.rank, self.device = board, rank, device
        self.asked: ray.ObjectRef | None = None
        self.next_ask = self.next_look = 0.0
        if not watched():
            self.next_look = math.inf  # looking is a collective by way of an actor
        self.saved_for: list[str] | None = None
        self.last_call = math.inf  # rank 0's alone
        self.moves = False

    def __call__(self) -> Notice:
        """The most urgent that any worker has heard, the same on all."""
        heard = Notice(max_over_workers(self._heard(), self.device))
        return self._look() if heard == Notice.LOOK else heard

    def _heard(self) -> Notice:
        if self.rank != 0:
            return Notice.NOTHING
        now = time.monotonic()
        if self.asked is None and now >= self.next_ask:
            self.asked = self.board.asked_for.remote()
        if self.asked is not None and ray.wait([self.asked], timeout=0)[0]:
            (stop, move), self.asked, self.next_ask = ray.get(self.asked), None, now + self.STOP_S
            if stop:
                return Notice.STOP
            if move and not self.moves:
                self.moves = True
                return Notice.MOVE
        if now >= self.last_call:
            self.last_call = math.inf
            return Notice.SAVE
        if now >= self.next_look:
            self.next_look = now + self.PREEMPTION_S
            return Notice.LOOK
        return Notice.NOTHING

    def _look(self) -> Notice:
        info = ray.train.get_preemption_info()  # on all workers at once
        if info is None or self.saved_for == info.preempted_node_ids:
            return Notice.NOTHING
        self.saved_for = info.preempted_node_ids
        if info.deadline_ms is not None:
            left = info.deadline_ms / 1000 - time.time() - self.LAST_CALL_S
            self.last_call = time.monotonic() + left if left > self.LAST_CALL_S else math.inf
        return Notice.SAVE
