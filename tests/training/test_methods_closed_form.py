"""Each method of the comparison on data whose ODE is known: where its training must end, and that it ends there.

The teacher's N steps of DDIM compose to one affine map, and the student is affine: what a method claims of its student
(one step for two, one step for a window, any jump the same as the jumps before it) then holds exactly at its optimum.
"""

from __future__ import annotations

import pytest
import torch

from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.diffusion.schedule import add_noise
from hypersd_ray.diffusion.segments import grid
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.roles import PREVIOUS, STUDENT, TEACHER
from hypersd_ray.recipes.trajectory import TRAJECTORIES
from hypersd_ray.training.distiller import Distiller
from hypersd_ray.training.randomness import generator_of
from hypersd_ray.training.samples import Sampling, student_samples
from hypersd_ray.training.tscd import make_pair
from tests.helpers.affine import MEAN, SCHEDULE, AffineRoles, gaussian_batch, solve, train, x_T

STD, N = 0.4, 8
DOWN = grid(16, N)[::-1]


def config(tmp_path, method: str, steps: int, **changes) -> TSCDConfig:
    """The method's own settings, on a grid of 8 steps of T = 16; without guidance, which the teacher here has none of."""
    settings = TRAJECTORIES[method](steps, (1.0, 1.0))
    return TSCDConfig.model_validate({
        "teacher": str(tmp_path), "data": {"shards": "x.tar"},
        "distill": settings.distill.model_dump() | {"n_list": (N,) * len(settings.distill.k_list)} | changes,
        "adversarial": settings.adversarial.model_dump(),
        "optim": {"lr": 0.02, "batch": 256, "schedule": "cosine", "clip": 1e9},
    })  # fmt: skip


def off(roles, role, times, reference) -> float:
    """Greatest distance of the role's way along `times` from the reference, from the same noise."""
    return float((solve(roles, role, x_T(), times) - reference).abs().max())


def test_progressive_distillation_ends_at_the_teachers_own_steps(tmp_path):
    stages = {"k_list": (4, 2, 1), "n_list": (8, 4, 2), "steps_list": (250, 250, 250)}
    roles = train(config(tmp_path, "pd", 5, **stages), STD)
    eight = solve(roles, TEACHER, x_T(), DOWN)
    assert off(roles, TEACHER, [16, 0], eight) > 0.2
    assert off(roles, STUDENT, [16, 0], eight) < 0.02  # one step for the teacher's eight
    assert off(roles, PREVIOUS, [16, 8, 0], eight) < 0.02  # who taught it: two steps for eight


def test_consistency_distillation_ends_at_clean_data_from_every_time(tmp_path):
    roles = train(config(tmp_path, "lcm", 800), STD)
    for start in (0, 2, 5):
        x = solve(roles, TEACHER, x_T(), DOWN[: start + 1])
        exact = solve(roles, TEACHER, x, DOWN[start:])
        one = solve(roles, STUDENT, x, [DOWN[start], 0])
        assert float((one - exact).abs().max()) < 0.04
    assert off(roles, TEACHER, [16, 0], solve(roles, TEACHER, x_T(), DOWN)) > 0.2


def test_trajectory_consistency_makes_any_jumps_the_same(tmp_path):
    """On a point mass, where the teacher is such a student; one that is not told t_end cannot be it elsewhere."""
    settings, roles = config(tmp_path, "tcd", 400), AffineRoles(0.0)
    for name, p in roles.tables[STUDENT].items():
        p.data += 0.1 if name == "a" else -0.1
    noisy = add_noise(SCHEDULE, torch.full_like(x_T(), MEAN), x_T(), torch.full((64,), 16))

    def miss() -> float:
        """From T over a middle to clean data, against T to clean data at once, and against the mass itself."""
        worst, once = 0.0, solve(roles, STUDENT, noisy, [16, 0])
        for middle in (12, 8, 2):
            over = solve(roles, STUDENT, noisy, [16, middle, 0])
            worst = max(worst, float((over - once).abs().max()), float((over - MEAN).abs().max()))
        return worst

    before, distiller = miss(), Distiller(settings, roles, Conditioning(torch.zeros(1, 1, 1)))
    for seed in range(400):
        distiller.step(gaussian_batch(0.0, 256, seed))
    assert before > 1
    assert miss() < 0.05


def exact_lines(roles: AffineRoles, k: int) -> None:
    """Set the student's tables to the noises that name the lines of the teacher's N steps through k windows."""
    alpha, sigma = (a.tolist() for a in (SCHEDULE.alpha, SCHEDULE.sigma))
    cuts = grid(16, k)
    for t_b, t_top in zip(cuts, cuts[1:], strict=False):
        way = [t for t in DOWN if t_b <= t <= t_top]
        probes = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
        c, g = (float(v) for v in solve(roles, TEACHER, probes, way).flatten())
        g -= c  # x_b = g x_top + c
        lam = alpha[t_b] / alpha[t_top]
        eta = sigma[t_b] - lam * sigma[t_top]
        for t in range(t_b + 1, t_top + 1):
            s = (t - t_b) / (t_top - t_b)
            slope, offset = (1 - s) * g + s, (1 - s) * c  # x_t = slope x_top + offset
            # eps = (x_b - lam x_top) / eta with x_top = (x_t - offset) / slope
            a = (g - lam) / slope / eta
            roles.tables[STUDENT]["a"].data[t] = a
            roles.tables[STUDENT]["b"].data[t] = c / eta - a * offset


@pytest.mark.parametrize("std", [0.0, STD])
def test_the_exact_velocity_of_the_windows_has_no_loss(std, tmp_path):
    settings = config(tmp_path, "perflow", 4).distill
    roles = AffineRoles(std)

    @torch.no_grad()
    def losses(roles):
        pairs = [
            make_pair(roles, gaussian_batch(std, 64, seed), Conditioning(torch.zeros(1, 1, 1)), settings, 0, generator_of(seed))
            for seed in range(8)
        ]  # fmt: skip
        return max(float((pair.student - pair.target).abs().max()) for pair in pairs)

    assert losses(roles) > 1e-3  # the denoiser itself is not it: its way through a window is bent
    exact_lines(roles, k=4)
    assert losses(roles) < 1e-9


def test_rectified_flow_crosses_a_window_in_one_step(tmp_path):
    roles = train(config(tmp_path, "perflow", 600), STD)
    eight, edges = solve(roles, TEACHER, x_T(), DOWN), [16, 12, 8, 4, 0]
    assert off(roles, TEACHER, edges, eight) > 0.1
    assert off(roles, STUDENT, edges, eight) < 0.02
    # and with more steps than windows along the lines, where DDIM's jumps leave them
    cond = Conditioning(torch.zeros(64, 1, 1))
    half = [16, 14, 12, 10, 8, 6, 4, 2, 0]
    straight = student_samples(roles, STUDENT, x_T(), cond, Sampling(8, tuple(half), windows=4))
    assert float((straight - eight).abs().max()) < 0.02
    assert off(roles, STUDENT, half, eight) > 0.05
