"""The four trajectory losses of the paper. They differ in how the two points were reached, not in how they compare.

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


def _to_fixed_target(student_x_end: Tensor, target_x_end: Tensor, distance: Distance) -> Tensor:
    return distance(student_x_end, target_x_end.detach())


# Eq. 5
def loss_pd(student_x_end: Tensor, target_x_end: Tensor, distance: Distance = mse) -> Tensor:
    """Progressive distillation: target = the teacher's two solver steps, x_hat at t_{n-2} (Eq. 3, 4). -> (B,).

    t_end_rule "two_steps". Raises ValueError when the shapes differ.
    """
    return _to_fixed_target(student_x_end, target_x_end, distance)


# Eq. 6
def loss_cd(student_x_end: Tensor, target_x_end: Tensor, distance: Distance = mse) -> Tensor:
    """Consistency distillation: target = Psi(x_hat_{t_{n-1}}, f_stu^-(x_hat_{t_{n-1}}, t_{n-1}), 0). -> (B,).

    t_end_rule "segment_start" with k = 1, so that both points lie at t = 0. Raises ValueError when the shapes differ.
    """
    return _to_fixed_target(student_x_end, target_x_end, distance)


# Eq. 7
def loss_ctm(student_x_end: Tensor, target_x_end: Tensor, distance: Distance = mse) -> Tensor:
    """Consistency trajectory model: target = Psi(x_hat_{t_{n-1}}, f_stu^-(...), t_end), any t_end <= t_{n-1}. -> (B,).

    t_end_rule "uniform" with k = 1. Raises ValueError when the shapes differ.
    """
    return _to_fixed_target(student_x_end, target_x_end, distance)


# Eq. 14
def loss_tscd(student_x_end: Tensor, target_x_end: Tensor, distance: Distance = mse) -> Tensor:
    """Trajectory segmented consistency distillation: Eq. 7's target with t_end in [t_b, t_{n-1}]. -> (B,).

    t_end_rule "uniform" with k = 8, 4, 2, 1. Here d is the non-adversarial part of the paper's hybrid; the adversarial
    part is losses/adversarial.py, mixed by losses/schedule.py. Raises ValueError when the shapes differ.
    """
    return _to_fixed_target(student_x_end, target_x_end, distance)
