"""A small training loop that a stopped job takes up again: what the embedded evaluators share."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

SAVE_EVERY = 100


def train(
    name: str,
    module: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    steps: int,
    lr: float,
    out: Path,
    seed: int = 0,
    weight_decay: float = 1e-3,
) -> nn.Module:
    """`steps` steps of AdamW under a one-cycle schedule; state in `out/{name}_state.pt`, removed by nobody.

    Args:
        loss: draws its batch from the generator it is given, a function of (seed, step).

    Raises:
        ValueError: the state is of a training of another length.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    first, path = 0, out / f"{name}_state.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["steps"] != steps:
            raise ValueError(
                f"{path} is of a training of {state['steps']} steps, this one has {steps}: use another --out"
            )
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
    begun, recent = time.monotonic(), 0.0
    for step in range(first, steps):
        value = loss(torch.Generator().manual_seed(seed * 1_000_003 + step))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = value.item() if step == first else 0.95 * recent + 0.05 * value.item()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            print(f"{name} step {step + 1}/{steps} loss {recent:.4f} "
                  f"{(time.monotonic() - begun) / (step + 1 - first):.3f} s/step", flush=True)  # fmt: skip
            kept = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
            part = path.with_suffix(".part")
            torch.save(kept | {"schedule": schedule.state_dict(), "step": step + 1, "steps": steps}, part)
            part.replace(path)
    return module


def flip_some(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half of the pictures mirrored, and which (B,) bool: no caption says left or right."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images), flip
