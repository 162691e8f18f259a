"""The actor that holds one reward or perception model for all training workers.

Torch and the model load on the first call that needs them, not when the actor is placed: so a placement that fails is
told from a model that takes long to load, and a restarted actor loads by itself.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

import numpy as np
import ray

from hypersd_ray.actors.batching import MicroBatcher
from hypersd_ray.actors.messages import Answer, to_answer, unpack
from hypersd_ray.config.rewards import PerceptionConfig, PlacementConfig, RewardConfig


@ray.remote
class EvaluatorActor:
    """Scores with gradients; every call is a pure function of its arguments, so it may be repeated after a restart."""

    def __init__(self, config: RewardConfig | PerceptionConfig, placement: PlacementConfig):
        self.config, self.placement = config, placement
        self.device = "cuda" if placement.num_gpus else "cpu"
        self.model: Any = None
        self.loading = asyncio.Lock()
        self.batcher = MicroBatcher(self._run, placement.max_batch, placement.wait_ms / 1000)

    async def ping(self) -> str:
        """The node it is on."""
        return ray.get_runtime_context().get_node_id()

    async def load(self) -> dict[str, Any]:
        """Load the model unless it is there; says what it is. Raises ValueError for a checkpoint that does not fit."""
        async with self.loading:
            if self.model is None:
                self.model = await asyncio.to_thread(self._load)
        return {
            "class": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "convention": getattr(self.model, "convention", ""),
        }

    def _load(self) -> Any:
        import torch

        from hypersd_ray.models.evaluators import load_evaluator

        if self.device == "cpu":
            torch.set_num_threads(max(1, int(self.placement.num_cpus)))
        return load_evaluator(self.config, self.device, self.placement.precision)

    async def evaluate(self, images: np.ndarray, told: list[Any], gradient: bool) -> Answer:
        """Scores of images (B, 3, H, W) float16 and, when asked, their gradients."""
        if self.model is None:
            await self.load()
        return await self.batcher.submit(images, told, gradient)

    def _run(self, images: np.ndarray, told: list[Any], gradient: bool) -> Answer:
        import torch

        from hypersd_ray.models.evaluators import evaluate

        # a copy: arrays out of the object store are read-only
        pixels = torch.from_numpy(np.array(images)).to(self.device).float()
        return to_answer(evaluate(self.model, pixels, unpack(told), gradient))

    async def counts(self) -> dict[str, int]:
        """calls, batches, images since this process began, and its process id."""
        import os

        return asdict(self.batcher.counts) | {"pid": os.getpid()}
