"""Same-seed samples and how they are laid out."""

from __future__ import annotations

import torch

from hypersd_ray.diffusion.solver import ddim_step
from hypersd_ray.models.roles import EMA, STUDENT, TEACHER
from hypersd_ray.training import samples
from tests.helpers.distil import disturb, make_batch, make_config, make_distiller


def test_a_prompts_noise_does_not_depend_on_its_neighbours():
    together = samples.start_noise(3, ["a cat", "a dog"], (4, 8, 8))
    assert together.shape == (2, 4, 8, 8)
    assert torch.equal(samples.start_noise(3, ["a dog"], (4, 8, 8))[0], together[1])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(samples.start_noise(4, ["a dog"], (4, 8, 8))[0], together[1])


def test_teacher_and_students_sample_by_their_own_networks(tmp_path):
    d, batch = make_distiller(make_config(tmp_path)), make_batch()
    for seed, role in enumerate((STUDENT, EMA)):
        disturb(d.roles, role, seed)
    x_T, full = batch.x0, lambda t: torch.full((4,), t)
    with torch.no_grad():
        omega = torch.full((4,), 3.0)
        guided = d.roles.guided(TEACHER, batch.cond, d.null, omega)
        x = ddim_step(d.roles.schedule, guided, x_T, full(1000), full(500))
        x = ddim_step(d.roles.schedule, guided, x, full(500), full(0))
        torch.testing.assert_close(samples.teacher_samples(d.roles, x_T, batch.cond, d.null, 2, 3.0), x)
        for role in (STUDENT, EMA):
            x = ddim_step(d.roles.schedule, d.roles.denoiser(role, batch.cond), x_T, full(1000), full(0))
            torch.testing.assert_close(samples.student_samples(d.roles, role, x_T, batch.cond, 1), x)
    a, b = (samples.student_samples(d.roles, STUDENT, x_T, batch.cond, samples.Sampling(4, eta=0.5), s) for s in (0, 1))
    assert not torch.equal(a, b)


def test_tiles_are_rows_of_pictures_with_gaps():
    rows = [torch.full((3, 3, 4, 5), value, dtype=torch.uint8) for value in (10, 20)]
    picture = samples.tile(rows, gap=1)
    assert picture.shape == (3, 2 * 6, 3 * 7)
    assert picture[:, 2, 3].tolist() == [10] * 3
    assert picture[:, 8, 17].tolist() == [20] * 3
    assert picture[:, 0, 0].tolist() == [255] * 3
