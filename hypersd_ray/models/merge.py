"""Several LoRAs as one (Sec. 3.2: "the LoRA merge technique"): exactly, at the summed rank, or compressed by SVD.

A LoRA is a dict of PEFT's names; its update of a module's weight is (alpha / rank) B A. Convolutions count as matrices:
A (r, in * kh * kw), B (out, r).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hypersd_ray.models.lora_file import one_rank, pairs_of


@dataclass(frozen=True, eq=False)
class Part:
    """One LoRA of a merge: its update counts `weight` times."""

    tensors: Mapping[str, Tensor]
    alpha: float
    weight: float = 1.0
    name: str = "LoRA"


@dataclass(frozen=True, eq=False)
class Merged:
    """One LoRA. `errors`: module -> ||exact - this||_F / ||exact||_F of its update; 0 for an exact merge."""

    tensors: dict[str, Tensor]
    rank: int
    alpha: float
    errors: dict[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The module with the greatest error."""
        return max(self.errors.items(), key=lambda item: item[1])


@torch.no_grad()
def concatenate_loras(parts: Sequence[Part]) -> Merged:
    """The exact sum of the updates: ranks add up, alpha is the new rank.

    A module that one part lacks gets zeros there. Each factor takes the square root of its scale, so that half
    precision files lose as little as they can.

    Raises:
        ValueError: no part, or parts whose shapes differ (of other base models), with the module.
    """
    if not parts:
        raise ValueError("nothing to merge: name at least one LoRA")
    pairs = [pairs_of(part.tensors, part.name) for part in parts]
    ranks = [one_rank(found, part.name) for found, part in zip(pairs, parts, strict=True)]
    modules = list(dict.fromkeys(module for found in pairs for module in found))
    tensors: dict[str, Tensor] = {}
    for module in modules:
        shapes = {part.name: _shape(found[module]) for found, part in zip(pairs, parts, strict=True) if module in found}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"{module} differs between the LoRAs ({shapes}): are they of the same base model?")
        a_like, b_like = next(found[module] for found in pairs if module in found)
        downs, ups = [], []
        for found, part, rank in zip(pairs, parts, ranks, strict=True):
            if module not in found:
                downs.append(torch.zeros(rank, *a_like.shape[1:]))
                ups.append(torch.zeros(len(b_like), rank, *b_like.shape[2:]))
                continue
            a, b = (t.detach().cpu().float() for t in found[module])
            scale = part.weight * part.alpha / rank
            root = abs(scale) ** 0.5
            downs.append(root * a)
            ups.append((root if scale >= 0 else -root) * b)
        tensors[f"{module}.lora_A.weight"] = torch.cat(downs, 0)
        tensors[f"{module}.lora_B.weight"] = torch.cat(ups, 1)
    return Merged(tensors, sum(ranks), float(sum(ranks)), dict.fromkeys(modules, 0.0))


@torch.no_grad()
def compress_lora(tensors: Mapping[str, Tensor], alpha: float, rank: int) -> Merged:
    """The nearest LoRA of `rank` to each module's update (Eckart-Young), with the error it makes.

    The SVD is of the r x r core between the factors' QR decompositions, so a full weight is never formed.

    Raises:
        ValueError: `rank` is not within 1..the present rank.
    """
    pairs = pairs_of(tensors, "LoRA")
    present = one_rank(pairs, "LoRA")
    if not 1 <= rank <= present:
        raise ValueError(f"rank={rank} must be within 1..{present}, the rank of the LoRA that is compressed")
    smaller: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for module, (a, b) in pairs.items():
        left, core_left = torch.linalg.qr(b.detach().cpu().double().flatten(1) * (alpha / present))
        right, core_right = torch.linalg.qr(a.detach().cpu().double().flatten(1).T)
        u, s, v = torch.linalg.svd(core_left @ core_right.T)
        s = s[: min(len(u), len(v))]
        kept = min(rank, len(s))
        root = s[:kept].sqrt()
        new_b = torch.zeros(len(b), rank, dtype=torch.float64)
        new_a = torch.zeros(rank, a[0].numel(), dtype=torch.float64)
        new_b[:, :kept] = left @ (u[:, :kept] * root)
        new_a[:kept] = (right @ (v[:kept].T * root)).T
        smaller[f"{module}.lora_A.weight"] = new_a.float().view(rank, *a.shape[1:])
        smaller[f"{module}.lora_B.weight"] = new_b.float().view(len(b), rank, *b.shape[2:])
        total = s.square().sum()
        errors[module] = float((s[kept:].square().sum() / total).sqrt()) if total > 0 else 0.0
    return Merged(smaller, rank, float(rank), errors)


def _shape(pair: tuple[Tensor, Tensor]) -> tuple[int, ...]:
    a, b = pair
    return (len(b), *a.shape[1:])
