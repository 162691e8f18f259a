"""How the hybrid distance d of Eq. 14 is mixed, stage by stage. Plain numbers, no tensors."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LossWeights:
    """Weights of one stage, unit-free: d = mse * MSE + adversarial * generator loss."""

    mse: float
    adversarial: float


def loss_weights(
    stage_index: int,
    num_stages: int,
    *,
    mse_start: float = 1.0,
    mse_end: float = 0.1,
    adv_start: float = 0.0,
    adv_end: float = 0.1,
    shape: float = 1.0,
) -> LossWeights:
    """Weights of stage `stage_index` of `num_stages`: start + (end - start) * (index / (num_stages - 1)) ** shape.

    The adversarial weight rises and the MSE weight falls over the stages (k = 8, 4, 2, 1), as Sec. 3.1 has it; the
    values are unpublished, these defaults ours (0.1 is PCM's adversarial weight). shape > 1 changes late, < 1 early,
    0 at once: the ends hold from the second stage on (SDXL-Lightning: MSE once, then the discriminator alone).
    A single stage is the last one (k = 1). Raises ValueError for weights that do not move that way (equal ends are
    allowed: a constant), a negative weight, shape < 0 or a stage that is not there.
    """
    if not 0 <= stage_index < num_stages:
        raise ValueError(f"stage_index={stage_index} must be within 0..{num_stages - 1} (num_stages={num_stages})")
    if shape < 0:
        raise ValueError(f"shape={shape} must be >= 0")
    if mse_end < 0 or adv_start < 0:
        raise ValueError(f"weights must be >= 0: mse_end={mse_end}, adv_start={adv_start}")
    if mse_end > mse_start:
        raise ValueError(f"the MSE weight must fall over the stages: mse_end={mse_end} > mse_start={mse_start}")
    if adv_end < adv_start:
        raise ValueError(f"the adversarial weight must rise over the stages: adv_end={adv_end} < adv_start={adv_start}")
    done = stage_index / (num_stages - 1) if num_stages > 1 else 1.0
    fraction = done**shape if done else 0.0  # 0 ** 0 would be 1
    # start * (1 - f) + end * f meets both ends exactly
    return LossWeights(
        mse=mse_start * (1 - fraction) + mse_end * fraction,
        adversarial=adv_start * (1 - fraction) + adv_end * fraction,
    )
