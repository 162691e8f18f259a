"""The shared actors as a backend of `hypersd_ray.models.scoring.RewardClient`."""

from __future__ import annotations

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError
from torch import Tensor

from hypersd_ray.actors.messages import gradient_of, pack
from hypersd_ray.actors.placement import Handles
from hypersd_ray.models.rewards.protocol import Scored
from hypersd_ray.models.scoring import Told


class RemoteBackend:
    """Shared actors. Pictures go through the object store once for all models.

    Args:
        handles: from `start_evaluators`.
        rank: picks this worker's replica.
    """

    def __init__(self, handles: Handles, rank: int = 0):
        self.handles = {name: replicas[rank % len(replicas)] for name, replicas in handles.items()}

    def __call__(self, images: Tensor, told: Told, gradient: bool) -> dict[str, Scored]:
        """Raises ValueError for what the model refuses, RuntimeError when an actor is gone for good."""
        stored = ray.put(images.half().cpu().numpy())
        asked = {name: self.handles[name].evaluate.remote(stored, pack(told[name]), gradient) for name in told}
        scored = {}
        for name, ref in asked.items():
            try:
                answer = ray.get(ref)
            except RayTaskError as error:
                raise ValueError(f"{name}: {error.cause}") from error
            except RayActorError as error:
                raise RuntimeError(f"{name}: its actor is gone and does not come back: {error}") from error
            values = torch.tensor(answer.values, device=images.device)
            scored[name] = Scored(values, gradient_of(answer, images) if gradient else None)
        return scored
