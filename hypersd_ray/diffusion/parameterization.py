"""What a network's output means: one conversion to (x0, eps), at the network's boundary.

Shapes
    output, x_t, x0, eps   (B, ...)
    alpha_t, sigma_t       (B, 1, ..., 1), see Schedule.at
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Parameterization = Literal["epsilon", "v_prediction", "sample", "flow"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """The clean latent and the noise a denoiser sees in x_t = alpha_t x0 + sigma_t eps. x0, eps: (B, ...)."""

    x0: Tensor
    eps: Tensor


def to_prediction(
    output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, parameterization: Parameterization
) -> Prediction:
    """(x0, eps) of a network's output, each (B, ...), in float32 at least.

    epsilon: output = eps; sample: output = x0; v_prediction: output = alpha_t eps - sigma_t x0; flow: output =
    eps - x0. epsilon needs alpha_t > 0, sample needs sigma_t > 0. Raises ValueError for another name.
    Half precision would not do: at SD's last step x0 divides by alpha = 0.068, so errors grow 14.6 times.
    """
    dtype = torch.promote_types(torch.promote_types(output.dtype, x_t.dtype), torch.float32)
    output, x_t, alpha_t, sigma_t = (a.to(dtype) for a in (output, x_t, alpha_t, sigma_t))
    if parameterization == "epsilon":
        return Prediction(x0=(x_t - sigma_t * output) / alpha_t, eps=output)
    if parameterization == "sample":
        return Prediction(x0=output, eps=(x_t - alpha_t * output) / sigma_t)
    if parameterization == "v_prediction":
        # (x_t, v) is (x0, eps) turned by an angle; the norm is 1 unless the schedule is not variance preserving
        norm = alpha_t**2 + sigma_t**2
        return Prediction(x0=(alpha_t * x_t - sigma_t * output) / norm, eps=(sigma_t * x_t + alpha_t * output) / norm)
    if parameterization == "flow":
        total = alpha_t + sigma_t  # 1 on the straight path
        return Prediction(x0=(x_t - sigma_t * output) / total, eps=(x_t + alpha_t * output) / total)
    raise ValueError(f"parameterization={parameterization!r} is not one of {', '.join(get_args(Parameterization))}")
