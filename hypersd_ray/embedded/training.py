"""A small training loop that a stopped job takes up again: what the embedded evaluators share."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SAVE_EVERY = 100


class Cycles:
    """One-cycle schedules of the learning rate, one after another over the same optimiser.

    Args:
        lengths: steps of each.
        lr: peak of each.
        warm: share of a cycle in which the rate rises.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, lengths: Sequence[int], lr: float, warm: float = 0.1):
        self.optimizer, self.lengths, self.lr, self.warm = optimizer, tuple(lengths), lr, warm
        self.done = 0
        self._begin(0)

    def _begin(self, cycle: int) -> None:
        self.cycle = cycle
        for group in self.optimizer.param_groups:
            group["initial_lr"] = self.lr  # what a scheduler would keep of the one before
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=self.lr, total_steps=self.lengths[cycle], pct_start=self.warm
        )

    def step(self) -> None:
        """After the optimiser's."""
        self.done += 1
        ends = list(itertools.accumulate(self.lengths))
        if self.done not in ends:
            self.schedule.step()
        elif self.done < ends[-1]:
            self._begin(self.cycle + 1)

    def state_dict(self) -> dict[str, Any]:
        """Which cycle, and where in it."""
        state = {"lengths": list(self.lengths), "cycle": self.cycle, "done": self.done}
        return state | {"schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; where the last cycle was done, with one that was added.

        Raises:
            ValueError: the cycles until there had another length.
        """
        until = state["cycle"] + 1
        if state["lengths"][:until] != list(self.lengths[:until]):
            raise ValueError(f"the state is of cycles of {state['lengths']} steps, these have {list(self.lengths)}")
        self.done = state["done"]
        now = [dict(group) for group in self.optimizer.param_groups]
        self._begin(state["cycle"])
        if self.done == sum(self.lengths[:until]) < sum(self.lengths):
            self._begin(until)
            return
        self.schedule.load_state_dict(state["schedule"])
        for group, values in zip(self.optimizer.param_groups, now, strict=True):
            group |= {"lr": values["lr"], "betas": values["betas"]}  # as the optimiser's own state has them


def train(
    name: str,
    module: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    steps: int | Sequence[int],
    lr: float,
    out: Path,
    seed: int = 0,
    weight_decay: float = 1e-3,
    device: torch.device | str = "cpu",
    of: str = "",
) -> nn.Module:
    """AdamW under one or several one-cycle schedules; state in `out/{name}_state.pt`, removed by nobody.

    Args:
        steps: of each cycle. A finished training goes on where a cycle is added.
        loss: draws its batch from the generator it is given, a CPU's, a function of (seed, step).
        device: where the module learns; that is where it is then.
        of: a hash of what else decides it; a state that is there must have the same.

    Raises:
        ValueError: the state is of a training of another length, or of something else.
    """
    module.to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay)
    lengths = (steps,) if isinstance(steps, int) else tuple(steps)
    schedule, steps = Cycles(optimizer, lengths, lr), sum(lengths)
    out.mkdir(parents=True, exist_ok=True)
    first, path = 0, out / f"{name}_state.pt"
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        if state.get("of", of) != of:
            raise ValueError(f"{path} is of other data, another base or another seed; use another --out")
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        try:
            schedule.load_state_dict(state["schedule"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}; use another --out") from None
        first = state["step"]
    begun, recent = time.monotonic(), torch.zeros(())
    for step in range(first, steps):
        torch.manual_seed(seed * 1_000_003 + step)  # dropout's, which takes no generator
        value = loss(torch.Generator().manual_seed(seed * 1_000_003 + step))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = value.detach() if step == first else 0.95 * recent + 0.05 * value.detach()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            print(f"{name} step {step + 1}/{steps} loss {recent.item():.4f} "
                  f"{(time.monotonic() - begun) / (step + 1 - first):.3f} s/step", flush=True)  # fmt: skip
            kept = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
            part = path.with_suffix(".part")
            torch.save(kept | {"schedule": schedule.state_dict(), "step": step + 1, "of": of}, part)
            part.replace(path)
    return module


def flip_some(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half of the pictures mirrored, and which (B,) bool: no caption says left or right."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flip.view(-1, 1, 1, 1).to(images.device), images.flip(-1), images), flip
