"""Human and perception feedback as functions of scores: Eq. 11, 12, 15, 16, 17.

Shapes
    r, r_w, r_l   (B,)       scores of a reward model; w preferred, l not
    valid         (B,) bool  False where a score is NaN: that sample takes no part
    instance      (B,)       losses of a perception model
    result        ()         unless said otherwise
"""

from collections.abc import Sequence
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor


# Eq. 11
def loss_rm(r_w: Tensor, r_l: Tensor) -> Tensor:
    """Preference training of a reward model: -log sigmoid(r(c, x_w) - r(c, x_l)), per pair: (B,), (B,) -> (B,)."""
    if r_w.shape != r_l.shape:
        raise ValueError(f"r_w {tuple(r_w.shape)} and r_l {tuple(r_l.shape)} must pair")
    return -F.logsigmoid(r_w - r_l)


# Eq. 12, and one term of Eq. 15's sum over d
def loss_hinge(r: Tensor, alpha: float, valid: Tensor | None = None) -> Tensor:
    """Mean of ReLU(alpha_d - r_d): samples above alpha_d are left alone, so a reward is not pushed without end.

    Eq. 12 (ReFL, minus the mean score) is this with alpha beyond every score, but for the constant alpha.
    """
    return _mean(F.relu(alpha - r), valid)


# Eq. 15
def loss_aes(
    scores: Sequence[Tensor],
    alphas: Sequence[float],
    valid: Sequence[Tensor] | None = None,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """The hinges of all reward models d, summed. Raises ValueError when scores, alphas and weights do not pair."""
    weights = [1.0] * len(scores) if weights is None else weights
    masks = [None] * len(scores) if valid is None else valid
    if not len(scores) == len(alphas) == len(weights) == len(masks) > 0:
        raise ValueError(
            f"{len(scores)} scores, {len(alphas)} alphas and {len(weights)} weights: one each, at least one"
        )
    parts = zip(scores, alphas, masks, weights, strict=True)
    return torch.stack([w * loss_hinge(r, alpha, ok) for r, alpha, ok, w in parts]).sum()


# Eq. 16
def loss_percep(instance: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean instance loss of m_I(x'_0) against GT(x_0); pictures without objects are in the mean with their 0."""
    return _mean(instance, valid)


# Eq. 17, with weights and the regulariser
@overload
def loss_feedback(
    aes: Tensor | float, percep: Tensor | float, drift: Tensor, w_aes: float, w_percep: float, w_drift: float
) -> Tensor: ...
@overload
def loss_feedback(aes: float, percep: float, drift: float, w_aes: float, w_percep: float, w_drift: float) -> float: ...
def loss_feedback(
    aes: Tensor | float, percep: Tensor | float, drift: Tensor | float, w_aes: float, w_percep: float, w_drift: float
) -> Tensor | float:
    """w_aes L_aes + w_percep L_percep + w_drift L_drift. The paper's Eq. 17 is (1, 1, 0)."""
    return w_aes * aes + w_percep * percep + w_drift * drift


def loss_drift(x0: Tensor, x0_reference: Tensor) -> Tensor:
    """Mean squared distance of the predicted clean latents to those of the model that training began from.

    (B, ...), (B, ...) -> (). With Gaussian steps of fixed variance this is their KL divergence up to a factor: what
    keeps a reward from being raised by leaving the domain.
    """
    if x0.shape != x0_reference.shape:
        raise ValueError(f"x0 {tuple(x0.shape)} and its reference {tuple(x0_reference.shape)} must have one shape")
    return (x0.float() - x0_reference.detach().float()).square().mean()


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Over the valid samples; 0, still in the graph, when there is none."""
    if valid is None:
        return values.mean()
    kept = torch.where(valid, values, torch.zeros_like(values))
    return kept.sum() / valid.sum().clamp(min=1)
