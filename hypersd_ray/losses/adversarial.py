"""Adversarial losses as functions of a discriminator's logits.

Shapes
    real_logits, fake_logits   one (B, ...) map per head: (B, 1, h, w) or (B,)
    result                     (B,): the mean over each map, then over the heads
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

AdversarialKind = Literal["hinge", "non_saturating", "wasserstein"]


def discriminator_loss(real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor], kind: AdversarialKind) -> Tensor:
    """What the discriminator minimises, per sample: (B,), in float32 at least.

    hinge (PCM): relu(1 - real) + relu(1 + fake); non_saturating (Lightning): softplus(-real) + softplus(fake);
    wasserstein (Eq. 9): fake - real. Pass logits of a detached fake. Raises ValueError for an unknown kind or when
    the heads do not pair up. Paper: Eq. 9, Sec. 3.1.
    """
    if len(real_logits) != len(fake_logits):
        raise ValueError(f"{len(real_logits)} heads judged the real side, {len(fake_logits)} the fake: they must pair")
    if kind == "hinge":
        return _mean(real_logits, lambda d: F.relu(1 - d)) + _mean(fake_logits, lambda d: F.relu(1 + d))
    if kind == "non_saturating":
        return _mean(real_logits, lambda d: F.softplus(-d)) + _mean(fake_logits, F.softplus)
    if kind == "wasserstein":
        # Eq. 9
        return _mean(fake_logits, lambda d: d) - _mean(real_logits, lambda d: d)
    raise _unknown(kind)


def generator_loss(fake_logits: Sequence[Tensor], kind: AdversarialKind) -> Tensor:
    """What the student minimises, per sample: (B,), in float32 at least.

    hinge and wasserstein (Eq. 8): -fake; non_saturating: softplus(-fake). Raises ValueError for an unknown kind or no
    heads. Paper: Eq. 8, Sec. 3.1.
    """
    if kind in ("hinge", "wasserstein"):
        # Eq. 8
        return _mean(fake_logits, lambda d: -d)
    if kind == "non_saturating":
        return _mean(fake_logits, lambda d: F.softplus(-d))
    raise _unknown(kind)


def _mean(logits: Sequence[Tensor], f: Callable[[Tensor], Tensor]) -> Tensor:
    """f of every logit, averaged over each head's map and then over heads, so that no head wins by its size: (B,)."""
    if not logits:
        raise ValueError("no logits: the discriminator needs at least one head")
    widened = (d.to(torch.promote_types(d.dtype, torch.float32)) for d in logits)
    return torch.stack([f(d).reshape(d.shape[0], -1).mean(dim=1) for d in widened]).mean(dim=0)


def _unknown(kind: str) -> ValueError:
    return ValueError(f"adversarial kind={kind!r} is not one of {', '.join(get_args(AdversarialKind))}")
