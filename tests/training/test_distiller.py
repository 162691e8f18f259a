"""The optimiser step: what it learns, whom it touches, and what it does with a NaN."""

from __future__ import annotations

import pytest
import torch

from hypersd_ray.config.run import OptimConfig
from hypersd_ray.models.roles import EMA, PREVIOUS, STUDENT, TEACHER
from hypersd_ray.training.adversarial import adversarial_losses, draw_t_star
from hypersd_ray.training.progress import learning_rate
from hypersd_ray.training.randomness import generator_of
from hypersd_ray.training.tscd import consistency_loss, empty_some, make_pair, solver
from tests.helpers.distil import (
    ADVERSARIAL,
    SETTINGS,
    disturb,
    make_batch,
    make_config,
    make_distiller,
    one_stage,
    run_stages,
    same,
    snapshot,
    student_parameters,
)


def role_tensors(d, role):
    return {n: p.detach().clone() for n, p in d.roles.named_tensors(role).items()}


@torch.no_grad()
def loss_on(d, batch):
    """Eq. 14 on four fixed draws."""
    pairs = [make_pair(d.roles, batch, d.null, d.config.distill, 0, generator_of(seed)) for seed in range(4)]
    return sum(float(consistency_loss(pair, d.measure)) for pair in pairs) / len(pairs)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_loss_falls(setting, tmp_path):
    config = one_stage(
        tmp_path, setting, distill={"steps_list": (60,), "ema_decay": 0.9, "omega_min": 4, "perturbation": 0.0},
        optim={"lr": 2e-3},
    )  # fmt: skip
    d, batch = make_distiller(config), make_batch()
    before = loss_on(d, batch)
    for _ in range(12):
        d.step(batch)
    assert loss_on(d, batch) < 0.85 * before


def test_full_training_learns_and_leaves_the_base_alone(tmp_path):
    config = one_stage(tmp_path, "PD", full_unet=True, optim={"lr": 1e-4})
    d, batch = make_distiller(config), make_batch()
    base, before = {n: p.clone() for n, p in d.roles.unet.named_parameters()}, loss_on(d, batch)
    lora = make_distiller(one_stage(tmp_path, "PD"))
    assert before == pytest.approx(loss_on(lora, batch), rel=1e-5)  # both start as the base
    for _ in range(10):
        d.step(batch)
    assert loss_on(d, batch) < 0.85 * before
    assert same(base, {n: p.detach() for n, p in d.roles.unet.named_parameters()})
    assert not same(base, role_tensors(d, STUDENT))


def test_a_step_is_adamw_on_the_mean_gradient_and_an_ema(tmp_path):
    """Accumulation draws for each part on its own; the step is one on the mean of the parts' losses."""
    config = make_config(tmp_path, optim={"accumulation": 2, "clip": 1e9})
    d, batch = make_distiller(config), make_batch()
    ema = role_tensors(d, EMA)
    by_hand = make_distiller(config)
    losses = []
    for index in range(2):
        half = batch.rows(2 * index, 2 * index + 2)
        generator = generator_of(config.run.seed, 0, 0, 0, index)
        pair = make_pair(by_hand.roles, half, by_hand.null, config.distill, 0, generator)
        losses.append((pair.student - pair.target).square().mean())
    mean = (losses[0] + losses[1]) / 2
    optimizer = torch.optim.AdamW(student_parameters(by_hand.roles), lr=1e-3, weight_decay=0)
    mean.backward()
    norm = torch.cat([p.grad.flatten() for p in student_parameters(by_hand.roles)]).norm()
    optimizer.step()
    metrics = d.step(batch)
    assert float(metrics["loss"]) == pytest.approx(mean.item(), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-4)
    expected = role_tensors(by_hand, STUDENT)
    for name, p in d.roles.named_tensors(STUDENT).items():
        # Adam divides by the gradient's own size: where that is next to nothing the sum's rounding shows
        torch.testing.assert_close(p, expected[name], rtol=0, atol=2e-4)
        torch.testing.assert_close(d.roles.named_tensors(EMA)[name], 0.95 * ema[name] + 0.05 * p)
    assert d.progress.step == 1


def test_ranks_and_steps_draw_different_numbers_and_the_same_rank_the_same(tmp_path):
    config = make_config(tmp_path)
    first, again, other = (make_distiller(config, rank=r) for r in (0, 0, 1))
    losses = [[float(d.step(make_batch())["loss"]) for _ in range(2)] for d in (first, again, other)]
    assert losses[0] == losses[1]
    assert len({*losses[0], *losses[2]}) == 4
    assert same(snapshot(first), snapshot(again))


def test_the_gradient_is_clipped(tmp_path):
    """Adam's first step hides the size; its first moment does not."""
    d = make_distiller(make_config(tmp_path, optim={"clip": 1e-3}))
    norm = d.step(make_batch())["grad_norm"]
    assert norm > 1e-2
    moments = [m.flatten() for name, m in d.student.moments().items() if name.startswith("exp_avg/")]
    assert float(torch.cat(moments).norm()) == pytest.approx(0.1 * 1e-3, rel=1e-3)


@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_step_changes_nothing_and_the_next_goes_on(bad, adversarial, tmp_path):
    d = make_distiller(make_config(tmp_path, **({"adversarial": ADVERSARIAL} if adversarial else {})))
    d.step(make_batch(0))
    before, moments = snapshot(d), snapshot(d, moments=True)
    poisoned = make_batch(1)
    poisoned.x0[2, 1, 3, 3] = bad
    metrics = d.step(poisoned)
    assert not torch.isfinite(metrics["grad_norm"])
    assert same(snapshot(d), before)
    assert same(snapshot(d, moments=True), moments)
    assert (d.progress.step, d.progress.skipped, d.progress.bad_in_a_row) == (2, 1, 1)
    d.step(poisoned)
    assert (d.progress.step, d.progress.skipped, d.progress.bad_in_a_row) == (3, 2, 2)
    metrics = d.step(make_batch(2))
    assert all(torch.isfinite(value) for value in metrics.values())
    assert (d.progress.step, d.progress.skipped, d.progress.bad_in_a_row) == (4, 2, 0)
    assert not any(torch.equal(a, b) for n, a in snapshot(d).items() if n.startswith("ema/") and "lora_B" in n
                   for b in [before[n]])  # fmt: skip
    assert all(torch.isfinite(t).all() for t in snapshot(d).values())


def test_a_bad_discriminator_gradient_skips_the_step_too(tmp_path):
    """The student's own loss is fine there; its adversary's must not get away with a NaN."""
    d = make_distiller(make_config(tmp_path, adversarial=ADVERSARIAL | {"warmup_share": 0.9}))
    next(d.adversary.network.parameters()).register_hook(lambda g: g * float("nan"))
    before = snapshot(d)
    d.step(make_batch())
    assert same(snapshot(d), before)
    assert d.progress.skipped == 1


def test_learning_rate():
    cosine = OptimConfig(lr=2.0, schedule="cosine", warmup=4)
    rates = [learning_rate(cosine, step, 20) for step in range(21)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert all(a > b for a, b in zip(rates[4:-1], rates[5:], strict=True))
    assert rates[12] == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # halfway between warm-up and end
    assert rates[20] == pytest.approx(0.2)
    constant = OptimConfig(lr=2.0, warmup=2)
    assert [learning_rate(constant, step, 5) for step in range(5)] == [1.0, 2.0, 2.0, 2.0, 2.0]
    assert learning_rate(OptimConfig(lr=2.0, schedule="cosine", warmup=9), 5, 5) == pytest.approx(2.0 * 6 / 9)


def test_the_optimizer_follows_the_learning_rate(tmp_path):
    d = make_distiller(make_config(tmp_path, optim={"schedule": "cosine", "warmup": 2}))
    rates = []
    for step in range(4):
        d.step(make_batch(step))
        rates.append(d.student.optimizer.param_groups[0]["lr"])
    assert rates == [learning_rate(d.config.optim, step, 4) for step in range(4)]


def test_the_adversarial_losses_reach_only_whom_they_should(tmp_path):
    config = make_config(tmp_path, adversarial=ADVERSARIAL)
    d, batch = make_distiller(config), make_batch()
    disturb(d.roles, STUDENT, 0)
    pair = make_pair(d.roles, batch, d.null, config.distill, 0, generator_of(1))
    student, heads = adversarial_losses(d.roles, d.adversary.network, pair, batch.cond, "hinge", generator_of(2))
    head_parameters = list(d.adversary.network.parameters())
    heads.backward(retain_graph=True)
    assert all(p.grad is not None for p in head_parameters)
    assert all(p.grad is None for p in student_parameters(d.roles))
    seen = [p.grad.clone() for p in head_parameters]
    student.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(head_parameters, seen, strict=True))
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in student_parameters(d.roles))
    assert any(float(p.grad.abs().max()) > 0 for p in student_parameters(d.roles))
    trainable = {id(p) for p in student_parameters(d.roles)}
    assert all(p.grad is None for p in d.roles.unet.parameters() if id(p) not in trainable)


def test_the_judging_time_lies_between_end_and_start(tmp_path):
    config = make_config(tmp_path)
    d = make_distiller(config)
    pair = make_pair(d.roles, make_batch(size=64), d.null, config.distill, 0, generator_of(1))
    for seed in range(20):
        t_star = draw_t_star(pair, generator_of(seed))
        assert bool(((t_star >= pair.times.t_end.clamp(min=1)) & (t_star <= pair.times.t_n)).all())


def test_the_student_hears_of_the_discriminator_after_the_warmup_only(tmp_path):
    """Half a stage of 4: steps 0 and 1 move the student as MSE alone does, though the heads learn; step 2 does not."""
    schedule = {"adv_start": 0.5, "adv_end": 0.5, "mse_start": 0.7, "mse_end": 0.7, "warmup_share": 0.5, "lr": 1e-2}
    plain = make_distiller(make_config(tmp_path, adversarial=schedule | {"adv_start": 0.0, "adv_end": 0.0}))
    hybrid = make_distiller(make_config(tmp_path, adversarial=schedule))
    heads = {n: t.clone() for n, t in hybrid.adversary.network.state_dict().items()}
    for step in range(2):
        plain.step(make_batch(step))
        hybrid.step(make_batch(step))
    assert same(role_tensors(plain, STUDENT), role_tensors(hybrid, STUDENT))
    assert not same(heads, hybrid.adversary.network.state_dict())
    plain.step(make_batch(2))
    hybrid.step(make_batch(2))
    assert not same(role_tensors(plain, STUDENT), role_tensors(hybrid, STUDENT))


def test_the_stages_weights_rise_and_fall_and_the_discriminator_comes_with_its_weight(tmp_path):
    stages = {"k_list": (4, 2, 1), "n_list": (8, 8, 8), "steps_list": (1, 1, 1)}
    d = make_distiller(make_config(tmp_path, distill=stages, adversarial={"adv_end": 0.2, "mse_end": 0.5}))
    seen = []
    while not d.finished:
        seen.append((d.weights.mse, d.weights.adversarial, d.adversary is not None))
        metrics = d.step(make_batch())
        assert ("adversarial" in metrics) == (d.adversary is not None)
        d.next_stage()
    assert seen == [(1.0, 0.0, False), (0.75, pytest.approx(0.1), True), (0.5, 0.2, True)]


def test_a_new_stage_starts_from_the_student_with_new_moments(tmp_path):
    d = make_distiller(make_config(tmp_path, distill={"teacher": "previous"}, adversarial=ADVERSARIAL))
    run_stages(d, until=3)
    d.step(make_batch(3))
    student, heads = role_tensors(d, STUDENT), {n: t.clone() for n, t in d.adversary.network.state_dict().items()}
    assert not same(student, role_tensors(d, EMA))
    assert not same(student, role_tensors(d, PREVIOUS))
    d.next_stage()
    assert (d.progress.stage, d.progress.step) == (1, 0)
    assert same(student, role_tensors(d, STUDENT))
    assert same(student, role_tensors(d, EMA))
    assert same(student, role_tensors(d, PREVIOUS))
    assert not d.student.moments()
    assert not same(heads, d.adversary.network.state_dict())
    d.step(make_batch(4))
    assert same(student, role_tensors(d, PREVIOUS))  # the teacher of this stage stands still
    assert not same(student, role_tensors(d, STUDENT))


def test_the_base_never_moves(tmp_path):
    d = make_distiller(make_config(tmp_path, adversarial=ADVERSARIAL))
    own = {id(p) for role in (STUDENT, EMA) for p in d.roles.named_tensors(role).values()}
    base = {n: p.clone() for n, p in d.roles.unet.named_parameters() if id(p) not in own}
    run_stages(d)
    assert all(torch.equal(p, base[n]) for n, p in d.roles.unet.named_parameters() if n in base)
    with d.roles.playing(TEACHER) as unet:
        assert unet is d.roles.unet


def test_a_guidance_keeping_run_learns_the_unguided_teacher_with_and_without_prompts(tmp_path):
    config = make_config(tmp_path, distill={"omega_min": 1, "omega_max": 1, "empty_prompts": 0.5})
    assert config.distill.keeps_guidance and not make_config(tmp_path).distill.keeps_guidance
    d, batch = make_distiller(config), make_batch()
    emptied = empty_some(batch, d.null, 0.5, generator_of(0))
    draws = torch.rand(len(batch.x0), generator=generator_of(0)) < 0.5
    assert 0 < draws.sum() < len(draws)
    for row, empty in enumerate(draws):
        expected = d.null.prompt_embeds[0] if empty else batch.cond.prompt_embeds[row]
        assert torch.equal(emptied.cond.prompt_embeds[row], expected)
    # the solver is the teacher alone: twice the prompt's own prediction gives no guided one
    x, t = batch.x0, torch.full((len(batch.x0),), 500)
    alone = solver(d.roles, batch, d.null, config.distill, 0, generator_of(1))(x, t).eps
    torch.testing.assert_close(alone, d.roles.predict(TEACHER, x, t, batch.cond).eps)
    assert torch.isfinite(d.step(batch)["loss"])
