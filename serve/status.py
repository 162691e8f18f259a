"""Whether the application can answer: what GET /health says."""

from __future__ import annotations

import asyncio
import time

from pydantic import BaseModel
from ray import serve as ray_serve

DENOISER = "Denoiser"


class Health(BaseModel):
    """`ok`: a request would be worked on. `starting`: no replica of the model is ready yet."""

    status: str
    replicas: dict[str, int]


class Status:
    """Asks Serve's controller, at most once a second."""

    def __init__(self, sleeps: bool):
        self.sleeps = sleeps  # with scaling to zero, no replica is no fault: a request starts one
        self._last, self._when, self._lock = Health(status="starting", replicas={}), 0.0, asyncio.Lock()

    async def health(self) -> Health:
        """The state of the model's replicas."""
        async with self._lock:
            if time.monotonic() - self._when > 1:
                self._last, self._when = await asyncio.to_thread(self._ask), time.monotonic()
        return self._last

    def _ask(self) -> Health:
        name = ray_serve.get_replica_context().app_name
        deployment = ray_serve.status().applications[name].deployments[DENOISER]
        replicas = {str(getattr(state, "value", state)): count for state, count in deployment.replica_states.items()}
        ready = replicas.get("RUNNING", 0) > 0 or self.sleeps
        return Health(status="ok" if ready else "starting", replicas=replicas)
