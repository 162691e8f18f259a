"""The one-step training step on tiny UNets: what moves, what does not, and that a resumed run is the same run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import LCMScheduler, TCDScheduler

from hypersd_ray.diffusion.schedule import scaled_linear
from hypersd_ray.losses.dmd import dmd_gradient
from hypersd_ray.models.roles import EMA, FAKE, STUDENT, TEACHER, FullRoles
from hypersd_ray.models.scoring import LocalBackend, RewardClient
from hypersd_ray.training.checkpoint import load_checkpoint, save_checkpoint
from hypersd_ray.training.onestep import OdePairs, OneStep, single_step
from hypersd_ray.training.rewarded import Rewarded
from tests.helpers.distil import make_config, make_distiller, same, snapshot, student_parameters
from tests.helpers.pipelines import BETAS, call, micro_unet, tiny_unet, tiny_vae
from tests.training.onestep_parts import batch_of, config, copies, differ, inputs, null_of, one_step


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_student_and_fake_score_learn_and_the_base_stays(family, tmp_path):
    training = one_step(config(tmp_path), family)
    x_t, t, cond = inputs(family=family)
    bare = call(micro_unet() if family == "sd" else tiny_unet(family), x_t, t, cond)
    with torch.no_grad():
        assert torch.equal(training.roles.predict(FAKE, x_t, t, cond).eps, bare)  # DMD starts at the teacher's score
    before = {role: copies(training, role) for role in (STUDENT, FAKE, EMA)}
    for step in range(2):
        metrics = training.step(batch_of(seed=step, family=family))
    assert all(differ(before[role], copies(training, role)) for role in before)
    with torch.no_grad():
        assert torch.equal(training.roles.predict(TEACHER, x_t, t, cond).eps, bare)
    assert set(metrics) == {"loss", "consistency", "dmd", "fake_score", "grad_norm"}
    assert all(bool(torch.isfinite(value)) and not value.requires_grad for value in metrics.values())
    assert training.progress.step == 2 and training.progress.skipped == 0
    assert all(
        p.grad is None for p in [*training.roles.named_tensors(FAKE).values(), *student_parameters(training.roles)]
    )


def test_the_students_gradient_is_eq_10(tmp_path):
    # d loss / d theta = sum of dmd_gradient . d x / d theta, from networks evaluated here one by one
    training = one_step(config(tmp_path, consistency_share=0.0))
    for _ in range(2):
        training.step(batch_of())  # away from where B = 0 and both scores agree
    roles, cond = training.roles, batch_of().cond
    x_T = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    x = single_step(roles, STUDENT, x_T, cond, 1000)
    training.matching_loss(x, cond, torch.Generator().manual_seed(7)).backward()
    got = [p.grad.clone() for p in student_parameters(roles)]
    training.student.optimizer.zero_grad()

    generator = torch.Generator().manual_seed(7)
    t = torch.randint(20, 981, (4,), generator=generator)
    alpha, sigma = roles.schedule.at(t)
    x = single_step(roles, STUDENT, x_T, cond, 1000)
    with torch.no_grad():
        x_t = alpha * x + sigma * torch.randn(x.shape, generator=generator)
        null = training.null.expand(4)
        a, b = (roles.predict(TEACHER, x_t, t, c).x0 for c in (cond, null))
        fake = roles.predict(FAKE, x_t, t, cond).x0
        gradient = dmd_gradient(x, b + 2.0 * (a - b), fake)
    x.backward(gradient / x.numel())
    for mine, theirs in zip(student_parameters(roles), got, strict=True):
        torch.testing.assert_close(mine.grad, theirs, rtol=2e-3, atol=1e-6)
    assert sum(g.abs().sum() for g in got) > 0


def test_without_a_fake_score_it_is_score_distillation(tmp_path):
    training = one_step(config(tmp_path, dmd={"fake_updates": 0}))
    fake = copies(training, FAKE)
    metrics = training.step(batch_of())
    assert "fake_score" not in metrics and "dmd" in metrics
    assert not differ(fake, copies(training, FAKE))
    x = torch.randn(4, 4, 8, 8, requires_grad=True)
    training.matching_loss(x, batch_of().cond, torch.Generator().manual_seed(0)).backward()
    assert x.grad.abs().mean() > 0  # the fake side is x itself: towards what the teacher sees


@pytest.mark.parametrize(
    "changes", [{}, {"adversarial": {"adv_end": 0.1, "mse_end": 1.0, "lr": 1e-3, "warmup_share": 0.2}}]
)
def test_a_resumed_run_is_the_same_run_bitwise(changes, tmp_path):
    settings = config(
        tmp_path,
        dmd={"warmup_share": 0.2, "fake_updates": 1},
        optim={"schedule": "cosine", "accumulation": 2},
        consistency_share=0.5,
        **changes,
    )
    whole, first = one_step(settings), one_step(settings)
    for step in range(4):
        whole.step(batch_of(seed=step))
        if step < 2:
            first.step(batch_of(seed=step))
    save_checkpoint(tmp_path / "checkpoint", first)
    second = one_step(settings)
    load_checkpoint(tmp_path / "checkpoint", second)
    for step in range(2, 4):
        second.step(batch_of(seed=step))
    assert second.progress == whole.progress
    a, b = snapshot(whole), snapshot(second)
    assert a.keys() == b.keys() and any(name.startswith("fake/") for name in a)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert same(snapshot(whole, moments=True), snapshot(second, moments=True))
    assert any(name.startswith("discriminator/") for name in a) == bool(changes)


def test_a_checkpoint_without_a_fake_score_is_another_runs(tmp_path):
    save_checkpoint(tmp_path / "checkpoint", make_distiller(make_config(tmp_path)))
    with pytest.raises(ValueError, match=r"no fake score.*run\.name"):
        load_checkpoint(tmp_path / "checkpoint", one_step(config(tmp_path)))


def test_while_it_warms_up_only_the_fake_score_learns(tmp_path):
    training = one_step(config(tmp_path, mode="dedicated", dmd={"warmup_share": 0.5}))
    student, fake = copies(training, STUDENT), copies(training, FAKE)
    for step in range(3):
        training.step(batch_of(seed=step))
    assert not differ(student, copies(training, STUDENT))
    assert differ(fake, copies(training, FAKE))
    assert "dmd" in training.step(batch_of(seed=3))
    assert differ(student, copies(training, STUDENT))


def test_the_batch_is_shared_between_consistency_and_the_single_step(tmp_path):
    assert config(tmp_path).consistency_rows(4) == 1
    assert config(tmp_path, consistency_share=0.9).consistency_rows(4) == 3  # one is left for the single step
    assert config(tmp_path, mode="dedicated").consistency_rows(4) == 0
    metrics = one_step(config(tmp_path, mode="dedicated")).step(batch_of())
    assert "consistency" not in metrics and "dmd" in metrics


def test_regression_learns_pairs(tmp_path):
    settings = config(
        tmp_path, mode="dedicated", dmd={"weight": 0.0}, regression={"pairs": "x", "batch": 4},
        distill={"steps_list": (40,)}, optim={"lr": 3e-3},
    )  # fmt: skip
    training = one_step(settings)
    x_T, _, cond = inputs(4, seed=3)
    with torch.no_grad():
        near = single_step(training.roles, TEACHER, x_T, cond, 801) * 0.9 + 0.1
    losses = [float(training.step(batch_of(), OdePairs(x_T, near, cond))["regression"]) for _ in range(40)]
    assert losses[-1] < 0.2 * losses[0]


def test_an_update_with_nan_changes_nothing_but_the_counts(tmp_path):
    training = one_step(config(tmp_path))
    training.step(batch_of())
    before = snapshot(training)
    bad = batch_of()
    bad.cond.prompt_embeds[-1] = torch.nan
    training.step(bad)
    assert same(snapshot(training), before)
    training.step(bad)
    progress = training.progress
    assert (progress.skipped, progress.bad_in_a_row, progress.step) == (2, 2, 3)
    training.step(batch_of())
    assert training.progress.bad_in_a_row == 0


def test_a_nan_in_the_fake_score_alone_counts_too(tmp_path):
    training = one_step(config(tmp_path, dmd={"warmup_share": 0.9}))
    bad = batch_of()
    bad.cond.prompt_embeds[1:] = torch.nan  # row 0 goes on with consistency, which is well
    for _ in range(2):
        training.step(bad)
    assert (training.progress.skipped, training.progress.bad_in_a_row) == (2, 2)


def test_a_nan_in_the_fake_score_counts_where_nothing_else_learns(tmp_path):
    training = one_step(config(tmp_path, mode="dedicated", dmd={"warmup_share": 0.9}))
    bad, counts = batch_of(), []
    bad.cond.prompt_embeds[1:] = torch.nan
    for batch in (bad, bad, bad, batch_of(), bad):
        training.step(batch)
        counts.append((training.progress.skipped, training.progress.bad_in_a_row))
    assert counts == [(1, 1), (2, 2), (3, 3), (3, 0), (4, 1)]


def test_a_full_unets_step_is_adamws_first(tmp_path):
    """m = (1 - b1) g and v = (1 - b2) g^2, each divided by its (1 - b): theta' = (1 - lr wd) theta - lr g / (|g| + 1e-8)."""
    settings = config(tmp_path, full_unet=True, optim={"lr": 1e-3, "clip": 0.05, "weight_decay": 0.1})

    def fresh() -> OneStep:
        return OneStep(settings, FullRoles(micro_unet(), scaled_linear(), "epsilon"), null_of())

    training, by_hand = fresh(), fresh()
    fake, student, ema = (
        [p.clone() for p in by_hand.roles.named_tensors(role).values()] for role in (FAKE, STUDENT, EMA)
    )
    metrics = training.step(batch_of())
    by_hand._learn_fake(batch_of().chunks(1))
    by_hand._learn_student(batch_of(), None, by_hand._generator(0), 1)
    gradients = [p.grad for p in by_hand.roles.named_tensors(STUDENT).values()]
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    torch.testing.assert_close(metrics["grad_norm"], norm)
    assert norm > settings.optim.clip
    decay = settings.distill.ema_decay
    ended = zip(training.roles.named_tensors(STUDENT).values(), training.roles.named_tensors(EMA).values(), strict=True)
    for theta, average, g, (theirs, averaged) in zip(student, ema, gradients, ended, strict=True):
        g = g * 0.05 / (norm + 1e-6)
        expected = theta * (1 - 1e-3 * 0.1) - 1e-3 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(averaged, decay * average + (1 - decay) * expected, rtol=1e-5, atol=1e-6)
    assert differ(fake, copies(training, FAKE))


@pytest.mark.parametrize("full", [False, True])
def test_recomputed_activations_change_nothing(full, tmp_path):
    # The backward pass computes blocks again when another of three roles may be played.
    settings = config(tmp_path, full_unet=full, optim={"lr": 1e-4})
    ended = []
    for recompute in (False, True):
        training = one_step(settings)
        if full:
            roles = FullRoles(micro_unet(), scaled_linear(), "epsilon")
            if recompute:
                roles.checkpoint_activations()
            training = OneStep(settings, roles, null_of())
        elif recompute:
            training.roles.checkpoint_activations()
        for step in range(2):
            training.step(batch_of(seed=step))
        ended.append(snapshot(training))
    assert all(torch.allclose(a, ended[1][name], atol=1e-6) for name, a in ended[0].items())


def test_the_single_step_is_diffusers(tmp_path):
    # What is trained is what LCMScheduler(timesteps=[800]) and one TCD step from 999 do.
    training = one_step(config(tmp_path))
    training.step(batch_of())
    x_T, _, cond = inputs(2, seed=8)
    for index, scheduler in ((800, LCMScheduler(**BETAS)), (999, TCDScheduler(**BETAS, original_inference_steps=40))):
        scheduler.set_timesteps(**({"timesteps": [index]} if index == 800 else {"num_inference_steps": 1}))
        assert scheduler.timesteps.tolist() == [index] and scheduler.init_noise_sigma == 1
        with torch.no_grad(), training.roles.playing(STUDENT) as unet:
            eps = call(unet, x_T, torch.full((2,), index + 1), cond)
            theirs = scheduler.step(eps, index, x_T, return_dict=False)[0]
            ours = single_step(training.roles, STUDENT, x_T, cond, index + 1)
        # TCD stops at our t = 1 (alpha 0.9996), see the traps in the design
        torch.testing.assert_close(theirs, ours, rtol=2e-3, atol=0.05 if index == 999 else 2e-3)


def brightness(images, told):
    return torch.where(torch.tensor([t == "bad" for t in told]), torch.nan, images.mean((1, 2, 3)))


def test_feedback_judges_the_single_step_beside_the_other_losses(tmp_path):
    """The reward rises, who has no valid score takes no part, and a resumed run is the same run."""
    rewards = ({"name": "aesthetic_v2", "checkpoint": "x", "alpha": 2.0},)
    settings = config(
        tmp_path, feedback={"rewards": rewards, "weight": 10.0}, dmd={"warmup_share": 0.1, "fake_updates": 1},
        distill={"steps_list": (10,)}, optim={"lr": 3e-3},
    )  # fmt: skip
    torch.manual_seed(0)
    vae = tiny_vae("sd").eval().requires_grad_(False)

    def made() -> OneStep:
        plain = one_step(settings)
        client = RewardClient(LocalBackend({"aesthetic_v2": brightness}))
        return OneStep(settings, plain.roles, null_of(), 0, Rewarded(settings.models, vae, client, 2))

    captions = ("consistency", "good", "good", "bad")  # the first row is consistency's
    training, again = made(), made()
    history = [training.step(replace(batch_of(), captions=captions)) for _ in range(10)]
    assert "aes" not in history[0] and {"aes", "dmd", "consistency", "saturation"} <= history[-1].keys()
    assert history[-1]["reward/aesthetic_v2"] > history[1]["reward/aesthetic_v2"] + 1e-3
    assert history[-1]["dropped/aesthetic_v2"] == 9 and training.progress.skipped == 0

    half = made()
    for _ in range(5):
        half.step(replace(batch_of(), captions=captions))
    save_checkpoint(tmp_path / "half", half)
    load_checkpoint(tmp_path / "half", again)
    for _ in range(5):
        again.step(replace(batch_of(), captions=captions))
    assert same(snapshot(training), snapshot(again)) and again.notes() == training.notes()
