"""Whether the application can answer: what GET /health says."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from pydantic import BaseModel
from ray import serve as ray_serve

DENOISER, CHECKER = "Denoiser", "SafetyChecker"
logger = logging.getLogger("ray.serve")


class Health(BaseModel):
    """`ok`: a request would be worked on. `starting`: no replica of the model, or of the checker, is ready yet."""

    status: str
    replicas: dict[str, int]
    checkers: dict[str, int] = {}


class Status:
    """Asks Serve's controller, at most once a second."""

    def __init__(self, sleeps: bool, checked: bool = False):
        self.sleeps = sleeps  # with scaling to zero, no replica is no fault: a request starts one
        self.checked = checked
        self._last, self._when, self._lock = Health(status="starting", replicas={}), 0.0, asyncio.Lock()

    async def health(self) -> Health:
        """The state of the model's replicas, and the checker's."""
        async with self._lock:
            if time.monotonic() - self._when > 1:
                try:
                    self._last = await asyncio.to_thread(self._ask)
                except Exception:  # the controller is starting again, or does not know this application yet
                    logger.exception("the state of the replicas is not known")
                    self._last = Health(status="starting", replicas={})
                self._when = time.monotonic()
        return self._last

    def _ask(self) -> Health:
        name = ray_serve.get_replica_context().app_name
        deployments = ray_serve.status().applications[name].deployments
        replicas = _states(deployments[DENOISER])
        checkers = _states(deployments[CHECKER]) if self.checked else {}
        ready = replicas.get("RUNNING", 0) > 0 or self.sleeps
        ready &= checkers.get("RUNNING", 0) > 0 or not self.checked
        return Health(status="ok" if ready else "starting", replicas=replicas, checkers=checkers)


def _states(deployment: Any) -> dict[str, int]:
    return {str(getattr(state, "value", state)): count for state, count in deployment.replica_states.items()}
