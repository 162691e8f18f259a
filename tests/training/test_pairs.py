"""Both sides of Eq. 14: each published method is a setting, checked against its own formula written out here."""

from __future__ import annotations

import pytest
import torch

from hypersd_ray.diffusion.noise import perturb
from hypersd_ray.diffusion.schedule import add_noise
from hypersd_ray.diffusion.segments import grid, sample_times
from hypersd_ray.diffusion.solver import ddim_step
from hypersd_ray.models.roles import EMA, PREVIOUS, STUDENT, TEACHER
from hypersd_ray.training.randomness import generator_of, seed_of
from hypersd_ray.training.tscd import consistency_loss, distance, make_pair
from tests.helpers.distil import SETTINGS, disturb, make_batch, make_config, make_distiller, one_stage

N = 8
GRID = grid(1000, N)


def apart(config):
    """A distiller whose roles are four different networks."""
    d = make_distiller(config)
    for seed, role in enumerate([STUDENT, EMA, *([PREVIOUS] if config.distill.teacher == "previous" else [])]):
        disturb(d.roles, role, seed)
    return d


def draws(config, batch, seed, stage=0):
    """x_tn, times and omega, drawn in the order of Algorithm 1."""
    g = generator_of(seed)
    c = config.distill
    times = sample_times(len(batch.x0), 1000, c.n_list[stage], c.k_list[stage], c.t_end, g, "cpu")
    eps = perturb(torch.randn(batch.x0.shape, generator=g), c.perturbation, g)
    omega = c.omega_min + (c.omega_max - c.omega_min) * torch.rand(len(batch.x0), generator=g)
    return times, eps, omega


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_method_is_a_setting(setting, tmp_path):
    config = one_stage(tmp_path, setting)
    d, batch = apart(config), make_batch()
    schedule = d.roles.schedule
    with torch.no_grad():
        pair = make_pair(d.roles, batch, d.null, config.distill, 0, generator_of(7))
        times, eps, omega = draws(config, batch, 7)
        x_tn = add_noise(schedule, batch.x0, eps, times.t_n)
        guided = d.roles.guided(TEACHER, batch.cond, d.null, omega)
        x_prev = ddim_step(schedule, guided, x_tn, times.t_n, times.t_prev)
        second = {
            "PD": guided,  # Eq. 4: the teacher's two steps
            "LCM": d.roles.denoiser(STUDENT, batch.cond),  # Eq. 6, f_stu^-
            "CTM": d.roles.denoiser(EMA, batch.cond),  # Eq. 7
            "TSCD": d.roles.denoiser(EMA, batch.cond),  # Eq. 14
        }[setting]
        target = ddim_step(schedule, second, x_prev, times.t_prev, times.t_end)
        student = ddim_step(schedule, d.roles.denoiser(STUDENT, batch.cond), x_tn, times.t_n, times.t_end)
    torch.testing.assert_close(pair.target, target, rtol=0, atol=1e-6)
    torch.testing.assert_close(pair.student, student, rtol=0, atol=1e-6)
    assert torch.equal(pair.times.t_n, times.t_n)
    assert torch.equal(pair.times.t_end, times.t_end)


def many_times(setting, tmp_path, **distill):
    """The times of 512 pairs, as lists."""
    config = one_stage(tmp_path, setting, distill=distill).distill
    times = sample_times(512, 1000, N, config.k_list[0], config.t_end, generator_of(3), "cpu")
    return [tuple(int(t) for t in row) for row in zip(times.t_n, times.t_prev, times.t_end, times.t_b, strict=True)]


def test_progressive_distillation_jumps_over_two_steps(tmp_path):
    for t_n, t_prev, t_end, _ in many_times("PD", tmp_path):
        n = GRID.index(t_n)
        assert (t_prev, t_end) == (GRID[n - 1], GRID[max(0, n - 2)])


def test_consistency_distillation_jumps_to_clean_data(tmp_path):
    assert {t_end for _, _, t_end, _ in many_times("LCM", tmp_path)} == {0}


def test_ctm_jumps_anywhere_below(tmp_path):
    rows = many_times("CTM", tmp_path)
    assert all(0 <= t_end <= t_prev < t_n for t_n, t_prev, t_end, _ in rows)
    assert len({t_end for _, _, t_end, _ in rows}) > 100


def test_tscd_stays_in_the_segment(tmp_path):
    rows = many_times("TSCD", tmp_path)
    assert {t_b for *_, t_b in rows} == {0, 250, 500, 750}
    for t_n, t_prev, t_end, t_b in rows:
        assert t_b <= t_end <= t_prev < t_n <= t_b + 250


def test_with_as_many_segments_as_steps_all_methods_are_one(tmp_path):
    """k = N: a segment is one solver step, so every rule ends at t_prev and the target is the teacher's point itself."""
    pairs = {}
    for setting in ("PD", "LCM", "TSCD"):
        config = one_stage(tmp_path, setting, distill={"k_list": (N,)})
        d = apart(config)
        with torch.no_grad():
            pairs[setting] = make_pair(d.roles, make_batch(), d.null, config.distill, 0, generator_of(5))
        assert torch.equal(pairs[setting].times.t_end, pairs[setting].times.t_prev)
    # PD and LCM draw the same numbers ("uniform" draws one more), so there the points are equal too
    assert torch.equal(pairs["PD"].target, pairs["LCM"].target)
    assert torch.equal(pairs["PD"].student, pairs["LCM"].student)


def test_a_student_that_is_the_teacher_has_no_loss_over_one_step(tmp_path):
    """Where target and student are both the teacher's one step, Eq. 14 is 0; a disturbed student's is not."""
    config = one_stage(tmp_path, "PD", distill={"k_list": (N,), "omega_min": 1, "omega_max": 1})
    d = make_distiller(config)
    measure = distance(config.distill)

    @torch.no_grad()
    def loss():
        return float(
            consistency_loss(make_pair(d.roles, make_batch(), d.null, config.distill, 0, generator_of(5)), measure)
        )

    assert loss() == 0
    disturb(d.roles, STUDENT, 0)
    assert loss() > 1e-4


def test_guidance_of_one_is_the_conditional_network(tmp_path):
    """omega = 1 takes one pass in place of two, to the same target."""
    batch, targets = make_batch(), []
    for omega_max in (1.0, 1.0 + 1e-6):
        config = one_stage(tmp_path, "LCM", distill={"omega_min": 1, "omega_max": omega_max})
        d = apart(config)
        with torch.no_grad():
            targets.append(make_pair(d.roles, batch, d.null, config.distill, 0, generator_of(1)).target)
    torch.testing.assert_close(*targets, rtol=0, atol=1e-4)


def test_the_target_carries_no_gradient_and_the_student_does(tmp_path):
    config = one_stage(tmp_path, "LCM")
    d = apart(config)
    pair = make_pair(d.roles, make_batch(), d.null, config.distill, 0, generator_of(1))
    assert not pair.target.requires_grad
    assert pair.student.requires_grad


def test_the_previous_student_makes_the_steps_of_later_stages_only(tmp_path):
    config = make_config(tmp_path, distill={"teacher": "previous", "t_end": "segment_start", "perturbation": 0.0})
    d, batch = apart(config), make_batch()
    schedule = d.roles.schedule
    for stage in (0, 1):
        with torch.no_grad():
            pair = make_pair(d.roles, batch, d.null, config.distill, stage, generator_of(2))
            times, eps, omega = draws(config, batch, 2, stage)
            x_tn = add_noise(schedule, batch.x0, eps, times.t_n)
            teachers = [
                d.roles.guided(TEACHER, batch.cond, d.null, omega),
                d.roles.denoiser(PREVIOUS, batch.cond),  # guided when it was made, so not again
            ]
            targets = [
                ddim_step(
                    schedule, d.roles.denoiser(EMA, batch.cond),
                    ddim_step(schedule, teacher, x_tn, times.t_n, times.t_prev), times.t_prev, times.t_end,
                )
                for teacher in teachers
            ]  # fmt: skip
        torch.testing.assert_close(pair.target, targets[stage], rtol=0, atol=1e-6)
        assert (pair.target - targets[1 - stage]).abs().max() > 1e-3


def test_the_noise_perturbation_moves_whole_channels(tmp_path):
    """Offset noise: with strength, a channel's mean noise varies more than that of 64 independent numbers."""
    spread = {}
    for strength in (0.0, 1.0):
        config = one_stage(tmp_path, "LCM", distill={"perturbation": strength})
        _, eps, _ = draws(config, make_batch(size=64), 4)
        spread[strength] = float(eps.mean(dim=(2, 3)).std())
    assert spread[0.0] < 0.2 < 0.5 < spread[1.0]


def test_seeds_depend_on_every_part_and_its_place():
    seeds = {seed_of(*parts) for parts in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 10), (1, 0), ("x", 0)]}
    assert len(seeds) == 7
    assert seed_of(3, "x") == seed_of(3, "x")
    assert all(0 <= s < 2**63 for s in seeds)
