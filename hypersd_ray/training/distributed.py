"""The collectives of a plain step. LoRA gradients are small: they travel as one flat bucket after the backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


BUCKET = 2**25
"""Numbers that travel as one message; as many are copied at a time."""


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace every `.grad` by its mean over the workers; a NaN on one of them reaches all."""
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    gradients = [p.grad for p in parameters if p.grad is not None]
    for gradient in gradients:
        bucket.append(gradient)
        if gradient is gradients[-1] or sum(g.numel() for g in bucket) >= BUCKET:
            flat = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(flat)
            flat /= world_size()
            for own, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                own.copy_(mean.view_as(own))
            bucket = []


def sum_over_workers(values: Tensor) -> Tensor:
    """The sum of the workers' tensors, the same on all of them; on the group's device where there is a group."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def max_over_workers(value: int, device: torch.device | str = "cpu") -> int:
    """The greatest of the workers' values, the same on all of them."""
    if world_size() == 1:
        return value
    shared = torch.tensor([value], dtype=torch.int32, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared.item())


def of_first(value: list[str], device: torch.device | str = "cpu") -> list[str]:
    """Rank 0's list, on all workers."""
    if world_size() == 1:
        return value
    shared = [value]
    dist.broadcast_object_list(shared, device=torch.device(device))
    return shared[0]
