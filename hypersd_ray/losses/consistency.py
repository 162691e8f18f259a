"""The trajectory loss of the paper: one expression for Eq. 5, 6, 7 and 14.

Shapes
    student_x_end   (B, ...)   Psi(x_{t_n}, f_stu(x_{t_n}, t_n), t_end), carries the gradient
    target_x_end    (B, ...)   the point it should have reached; detached here
    result          (B,)       one loss per sample
"""

from collections.abc import Callable

from torch import Tensor

from hypersd_ray.losses.distances import mse

Distance = Callable[[Tensor, Tensor], Tensor]
"""(pred (B, ...), target (B, ...)) -> (B,)."""


# Eq. 5, 6, 7, 14
def loss_tscd(student_x_end: Tensor, target_x_end: Tensor, distance: Distance = mse) -> Tensor:
    """d(student_x_end, sg(target_x_end)) -> (B,). The equations differ in which points are handed in, not in how they compare:

        Eq. 5   progressive distillation    the teacher's two solver steps, x_hat at t_{n-2} (Eq. 3, 4)
        Eq. 6   consistency distillation    Psi(x_hat_{t_{n-1}}, f_stu^-(x_hat_{t_{n-1}}, t_{n-1}), 0)
        Eq. 7   consistency trajectory      the same to any t_end <= t_{n-1}
        Eq. 14  TSCD                        the same with t_end in [t_b, t_{n-1}], k = 8, 4, 2, 1 segments

    In `DistillConfig`'s words t_end is "two_steps" (Eq. 5); "segment_start" with k = 1, so that both points lie at t = 0
    (Eq. 6); "uniform" with k = 1 (Eq. 7) or more (Eq. 14). d is the non-adversarial part of Eq. 14's hybrid; the
    adversarial part is losses/adversarial.py, mixed by losses/schedule.py. Raises ValueError when the shapes differ.
    """
    return distance(student_x_end, target_x_end.detach())
