"""What learns one network's tensors: gradients in, steps out. Plain AdamW on every worker, or DeepSpeed (models/shards.py).

All workers make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from hypersd_ray.config.run import OptimConfig
from hypersd_ray.models.roles import Roles
from hypersd_ray.models.shards import MOMENTS
from hypersd_ray.models.zero import ZeroRoles
from hypersd_ray.training.distributed import average_gradients


class Learner(Protocol):
    """Between `backward` and `step` gradients add up."""

    @property
    def pending(self) -> bool:
        """There is a gradient that no step has used; who has none does not step."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the loss's gradient."""

    def step(self, lr: float, hold: bool = False) -> Tensor:
        """Average over the workers, clip, step; the gradient's norm before the clipping, a scalar.

        A NaN or inf on any worker, or `hold`, leaves weights and moments as they were; the norm is then not finite.
        """

    def forget(self) -> None:
        """Moments start anew."""

    def moments(self) -> dict[str, Tensor]:
        """`exp_avg/{name}`, `exp_avg_sq/{name}`, `step`; nothing before the first step. Where they are shared out, only
        rank 0 gets them."""

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """What `moments` gave, on every rank. Raises ValueError when it is of other tensors."""


class Replicated:
    """Every worker has all of the tensors and makes the same step.

    Args:
        named: the tensors by name.
        optimizer: over these, in this order; AdamW's kind of state.
        clip: greatest norm of the gradient.
    """

    def __init__(self, named: Mapping[str, Tensor], optimizer: torch.optim.AdamW, clip: float = float("inf")):
        self.named, self.optimizer, self.clip = dict(named), optimizer, clip
        self.pending = False
        self._norm: Tensor | None = None

    def backward(self, loss: Tensor) -> None:
        """See Learner."""
        loss.backward()
        self.pending = True

    def reduce(self) -> Tensor:
        """The norm of the gradient's mean over the workers, which is clipped to; `step` goes on from there."""
        if self._norm is None:
            average_gradients(list(self.named.values()))
            self._norm = torch.nn.utils.clip_grad_norm_(self.named.values(), self.clip).detach()
        return self._norm

    def step(self, lr: float, hold: bool = False) -> Tensor:
        """See Learner."""
        norm = self.reduce()
        if not hold and bool(torch.isfinite(norm)):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.pending, self._norm = False, None
        return torch.full_like(norm, float("nan")) if hold else norm

    def forget(self) -> None:
        """See Learner."""
        self.optimizer.state.clear()

    def moments(self) -> dict[str, Tensor]:
        """See Learner."""
        found: dict[str, Tensor] = {}
        for name, p in self.named.items():
            if state := self.optimizer.state.get(p):
                found |= {f"{key}/{name}": state[key] for key in MOMENTS} | {"step": state["step"]}
        return found

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """See Learner."""
        self.forget()
        if not moments:
            return
        wanted = {f"{key}/{name}" for key in MOMENTS for name in self.named} | {"step"}
        if differ := sorted(wanted ^ moments.keys()):
            raise ValueError(f"the optimiser's moments do not fit: {len(differ)} differ (first {differ[0]})")
        states: dict[int, Any] = {  # copies: what is read from a file may be a view into it
            i: {key: moments[f"{key}/{name}"].to(p.device, copy=True) for key in MOMENTS}
            | {"step": moments["step"].clone()}
            for i, (name, p) in enumerate(self.named.items())
        }
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": states})


def adamw(named: Mapping[str, Tensor], optim: OptimConfig) -> Replicated:
    """AdamW with the run's settings, on every worker."""
    optimizer = torch.optim.AdamW(
        named.values(), lr=optim.lr, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay,
        fused=True,  # one pass over the moments, no temporaries
    )  # fmt: skip
    return Replicated(named, optimizer, optim.clip)


def learner_of(roles: Roles, role: str, optim: OptimConfig) -> Learner:
    """Who learns `role`."""
    if isinstance(roles, ZeroRoles):
        return roles.trained[role]
    return adamw(roles.named_tensors(role), optim)
