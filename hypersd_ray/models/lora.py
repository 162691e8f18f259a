"""Low-rank adapters of one UNet, several roles side by side: student, EMA, previous stage (paper, Sec. 3.1: LoRA).

PEFT holds one active adapter and flips `requires_grad` at each switch; a distillation step needs three roles in turn
on one frozen base. Here a role is switched by one attribute that all layers share, and a layer with its update is one
operation (`low_rank.py`). The tensors have PEFT's shapes: A (r, in) or (r, in, kh, kw); B (out, r) or (out, r, 1, 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hypersd_ray.models.lean import slim
from hypersd_ray.models.low_rank import Before, Low, low_rank

LCM_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
"""The 14 target modules of the released LCM and Hyper-SD LoRAs."""


@dataclass
class Switch:
    """Which role the adapters play now; None is the bare base."""

    role: str | None = None


class RoleLoRA(nn.Module):
    """A frozen `Linear` or `Conv2d` with one low-rank update per role.

    Attributes:
        base: the frozen layer.
        A, B: role -> factor, float32 whatever the base's dtype.
        low: role -> both in a 16-bit base's dtype, as `Adapters.playing` brings them up to date.
        scale: alpha / rank.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, switch: Switch):
        super().__init__()
        if isinstance(base, nn.Conv2d):
            assert base.groups == 1 and base.padding_mode == "zeros" and not isinstance(base.padding, str)
        self.base, self.rank, self.scale, self.switch = base, rank, alpha / rank, switch
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        self.low: dict[str, Low] = {}

    def add(self, role: str, generator: torch.Generator) -> None:
        """A new role that changes nothing yet: A Kaiming-uniform, B zero."""
        weight = self.base.weight
        a_shape = (self.rank, *weight.shape[1:])
        bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
        a = (torch.rand(a_shape, generator=generator) * 2 - 1) * bound
        b = torch.zeros(weight.shape[0], self.rank, *[1] * (weight.ndim - 2))
        self.A[role] = nn.Parameter(a.to(weight.device))
        self.B[role] = nn.Parameter(b.to(weight.device))
        if weight.dtype in (torch.bfloat16, torch.float16):
            self.low[role] = (torch.empty_like(a, dtype=weight.dtype, device=weight.device),
                              torch.empty_like(b, dtype=weight.dtype, device=weight.device))  # fmt: skip

    def factors(self, role: str | None) -> tuple[Tensor, ...]:
        """A and B of a role; nothing for None."""
        return () if role is None else (self.A[role], self.B[role])

    def play(
        self, role: str | None, x: Tensor, before: Before | None = None, through: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """The layer of `before(x)` in a role; but for None, nothing that `before` makes is kept for the backward pass.

        `through`: the leaves in `before` that get a gradient.
        """
        if role is None:
            return self.base(x if before is None else before(x))
        return low_rank(x, self.base, self.A[role], self.B[role], self.scale, before, through, self.low.get(role))

    def forward(self, x: Tensor, before: Before | None = None, through: tuple[Tensor, ...] = ()) -> Tensor:
        """`play` in the role of now."""
        return self.play(self.switch.role, x, before, through)


class Adapters:
    """All low-rank roles of one network."""

    def __init__(self, network: nn.Module, rank: int, alpha: float, targets: tuple[str, ...] = LCM_TARGETS):
        """Freeze `network` and wrap the modules whose names end in one of `targets`.

        Raises:
            ValueError: no module matches.
        """
        self.rank, self.alpha, self.targets, self.switch = rank, alpha, targets, Switch()
        self.roles: set[str] = set()
        network.requires_grad_(False)
        self.layers: dict[str, RoleLoRA] = {}
        found = [
            n
            for n, m in network.named_modules()
            if isinstance(m, nn.Linear | nn.Conv2d) and n.endswith(tuple(f".{t}" for t in targets))
        ]
        if not found:
            raise ValueError(f"no module of {type(network).__name__} ends in one of {targets}: check lora.targets")
        for name in found:
            parent_name, _, child = name.rpartition(".")
            parent = network.get_submodule(parent_name)
            layer = RoleLoRA(getattr(parent, child), rank, alpha, self.switch)
            setattr(parent, child, layer)
            self.layers[name] = layer
        slim(network, RoleLoRA)

    def add(self, role: str, trainable: bool, seed: int = 0) -> None:
        """A role that equals the base until its tensors change."""
        self.roles.add(role)
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers.values():
            layer.add(role, generator)
            layer.A[role].requires_grad_(trainable)
            layer.B[role].requires_grad_(trainable)

    @torch.no_grad()
    def _refresh(self, role: str) -> None:
        """Bring a role's 16-bit copies up to its factors, which an optimiser or an average may have changed."""
        held = [(layer, layer.low[role]) for layer in self.layers.values() if role in layer.low]
        if held:
            torch._foreach_copy_([copy for _, low in held for copy in low],
                                 [factor for layer, _ in held for factor in layer.factors(role)])  # fmt: skip

    @contextmanager
    def playing(self, role: str | None, again: bool = False) -> Iterator[None]:
        """The network plays `role` inside the block; the bare base for None. `again`: what it played before, unchanged."""
        # A role that was never added would fail deep inside the network, or (worse) pass for the base.
        assert role is None or role in self.roles, f"role {role} was never added; there are {sorted(self.roles)}"
        if role is not None and not again:
            self._refresh(role)
        before, self.switch.role = self.switch.role, role
        try:
            yield
        finally:
            self.switch.role = before

    def named_tensors(self, role: str) -> dict[str, nn.Parameter]:
        """`{module}.lora_A.weight` and `{module}.lora_B.weight`, PEFT's names, in the network's order."""
        named = {}
        for name, layer in self.layers.items():
            named[f"{name}.lora_A.weight"] = layer.A[role]
            named[f"{name}.lora_B.weight"] = layer.B[role]
        return named

    @torch.no_grad()
    def load(self, role: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors (PEFT's names) into a role.

        Raises:
            ValueError: names or shapes differ, in one line.
        """
        own = self.named_tensors(role)
        missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        if missing or extra:
            raise ValueError(
                f"LoRA tensors do not fit this UNet: {len(missing)} missing (first {missing[:1]}), "
                f"{len(extra)} unexpected (first {extra[:1]}); is it of the same base model and targets?"
            )
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                rank = tensors[name].shape[0 if name.endswith("lora_A.weight") else 1]
                remedy = f"set lora.rank to {rank}" if rank != self.rank else "is it of the same base model?"
                raise ValueError(
                    f"LoRA tensor {name} is {tuple(tensors[name].shape)}, "
                    f"this run's is {tuple(parameter.shape)}: {remedy}"
                )
        # Only now: a role is loaded whole or left as it was.
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
