"""Every method of the comparison on a small UNet: its target written out by hand, its training, and its resuming."""

from __future__ import annotations

import math

import pytest
import torch

from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.diffusion.schedule import add_noise, scaled_linear
from hypersd_ray.diffusion.segments import Times, edges
from hypersd_ray.diffusion.solver import ddim_step
from hypersd_ray.diffusion.windows import Window, on_line
from hypersd_ray.losses.adversarial import discriminator_loss
from hypersd_ray.models.discriminator import LatentDiscriminator, features
from hypersd_ray.models.roles import PREVIOUS, STUDENT, TEACHER, LoRARoles
from hypersd_ray.recipes.methods import METHODS
from hypersd_ray.training.adversarial import adversarial_losses
from hypersd_ray.training.checkpoint import load_checkpoint, save_checkpoint
from hypersd_ray.training.distiller import Distiller
from hypersd_ray.training.onestep import OneStep, to_clean
from hypersd_ray.training.randomness import generator_of
from hypersd_ray.training.tscd import Pair, make_pair
from tests.helpers.distil import disturb, make_batch, make_distiller, make_roles, same, snapshot
from tests.helpers.pipelines import MICRO_SD, micro_unet
from tests.training.onestep_parts import batch_of, null_of

FIRST = ("lcm", "tcd", "perflow", "pd", "lightning", "turbo", "dmd", "tscd")


def micro(method: str, tmp_path, steps: int = 3) -> TSCDConfig:
    """The method's own recipe, for the micro UNet and `steps` steps in all (at least one a stage)."""
    first = METHODS[method](budget=32 * 64, lr=1e-3, seed=0).first
    values = first.model_dump()
    stages = len(values["distill"]["steps_list"])
    values["distill"]["steps_list"] = (1,) * stages if stages > 1 else (steps,)
    values |= {"teacher": str(tmp_path), "lora": {"rank": 4}}
    values["optim"] |= {"batch": 4, "warmup": 0}
    return type(first).model_validate(values)


def training(config: TSCDConfig, seed: int = 0) -> Distiller:
    if not isinstance(config, OneStepConfig):
        return make_distiller(config, seed=seed)
    return OneStep(config, LoRARoles(micro_unet(), scaled_linear(), "epsilon", 4, 4.0, seed=seed), null_of())


def run(state: Distiller, until: int | None = None) -> None:
    """As the loop steps; `until` counts steps over all stages."""
    done = sum(state.config.stage_steps[: state.progress.stage]) + state.progress.step
    while not state.finished and done != until:
        metrics = state.step(batch_of(seed=done) if isinstance(state, OneStep) else make_batch(done))
        assert all(bool(torch.isfinite(value)) for value in metrics.values()), metrics
        done += 1
        if state.progress.step == state.steps:
            state.next_stage()


@pytest.mark.parametrize("method", FIRST)
def test_a_recipe_trains_the_student_and_nothing_else(method, tmp_path):
    state = training(micro(method, tmp_path))
    before = snapshot(state)
    base = {n: p.clone() for n, p in micro_unet().named_parameters()}
    run(state)
    after = snapshot(state)
    assert not same(
        {n: before[n] for n in before if n.startswith("student/") and "lora_B" in n},
        {n: after[n] for n in after if n.startswith("student/") and "lora_B" in n},
    )
    assert state.progress.skipped == 0
    own = {n.replace(".base.", "."): p for n, p in state.roles.unet.named_parameters() if "adapter" not in n}
    assert base.keys() <= own.keys() and all(torch.equal(base[n], own[n]) for n in base)


def two_phases(tmp_path) -> TSCDConfig:
    """Lightning with one student of one step beside its first: both phases, two steps each."""
    values = micro("lightning", tmp_path).model_dump()
    values["distill"] |= {"k_list": (2, 1, 1), "n_list": (4, 2, 2), "steps_list": (1, 2, 2)}
    values["adversarial"] |= {"conditional": (False, True, False), "warmup_share": 0.0}
    return TSCDConfig.model_validate(values)


@pytest.mark.parametrize("method", ["perflow", "lightning", "turbo", "dmd"])
def test_a_broken_run_ends_where_the_unbroken_does(method, tmp_path):
    """Lightning is broken within and between the two phases of a stage."""
    config = two_phases(tmp_path) if method == "lightning" else micro(method, tmp_path)
    unbroken = training(config)
    points = (2, 3, 4) if method == "lightning" else (2,)
    for at in points:
        run(unbroken, until=at)
        save_checkpoint(tmp_path / str(at), unbroken)
    run(unbroken)
    for at in points:
        resumed = training(config, seed=5)
        load_checkpoint(tmp_path / str(at), resumed)
        run(resumed)
        assert same(snapshot(resumed), snapshot(unbroken)), f"broken after step {at}"
        assert resumed.progress == unbroken.progress


def pair_of(state: Distiller, stage: int, seed: int = 3, size: int = 4) -> Pair:
    with torch.no_grad():
        return make_pair(
            state.roles, make_batch(size=size), state.null, state.config.distill, stage, generator_of(seed)
        )


def walk(state: Distiller, denoiser, pair: Pair, N: int, steps: int) -> torch.Tensor:
    """`steps` DDIM steps of the grid of N from the pair's start, row by row of the batch."""
    points, rows = edges(1000, N), []
    for row, t_n in enumerate(pair.times.t_n.tolist()):
        x, n = pair.x_tn[row : row + 1], points.index(t_n)
        for i in range(steps):
            t, t_next = (torch.tensor([points[n - j]]) for j in (i, i + 1))
            with torch.no_grad():
                x = ddim_step(state.roles.schedule, denoiser(row), x, t, t_next)
        rows.append(x)
    return torch.cat(rows)


def of_row(batch, row):
    return batch.cond.rows(slice(row, row + 1))


def test_progressive_distillations_target_is_two_teacher_steps(tmp_path):
    state, batch = training(micro("pd", tmp_path)), make_batch()
    disturb(state.roles, STUDENT, 0)
    disturb(state.roles, PREVIOUS, 1)
    omega = torch.tensor([3.0])
    base = lambda row: state.roles.guided(TEACHER, of_row(batch, row), state.null, omega)
    previous = lambda row: state.roles.denoiser(PREVIOUS, of_row(batch, row))
    for stage, (k, teacher) in enumerate(zip((16, 8, 4, 2, 1), (base, *[previous] * 4), strict=True)):
        pair = pair_of(state, stage)
        assert set(pair.times.t_n.tolist()) <= set(edges(1000, k)[1:])  # a student of k steps is asked nowhere else
        target = walk(state, teacher, pair, 2 * k, 2)
        torch.testing.assert_close(pair.target, target, rtol=0, atol=2e-5)
        # Salimans and Ho's target for x0: the one whose DDIM step from x_t lands where the teacher's two do
        alpha, sigma = state.roles.schedule.at(pair.times.t_n)
        alpha_end, sigma_end = state.roles.schedule.at(pair.times.t_end)
        ratio = sigma_end / sigma
        x_tilde = (pair.target - ratio * pair.x_tn) / (alpha_end - ratio * alpha)
        eps_tilde = (pair.x_tn - alpha * x_tilde) / sigma
        torch.testing.assert_close(alpha_end * x_tilde + sigma_end * eps_tilde, pair.target, rtol=0, atol=1e-4)


def test_lightnings_phases_have_one_teacher_and_noise_at_the_top(tmp_path):
    config = micro("lightning", tmp_path)
    assert config.distill.k_list == (32, 8, 8, 4, 4, 2, 2, 1, 1)
    assert [config.adversarial.is_conditional(i) for i in range(9)] == [False, *(True, False) * 4]
    weights = [config.adversarial.weights(i, 9) for i in range(9)]
    assert [(w.mse, w.adversarial) for w in weights] == [(1.0, 0.0), *[(0.0, 1.0)] * 8]
    state, batch = training(config), make_batch()
    taught = []
    while not state.finished:
        taught.append([p.clone() for p in state.roles.named_tensors(PREVIOUS).values()])
        state.step(batch)
        disturb(state.roles, STUDENT, state.progress.stage)
        state.next_stage()
    equal = [
        all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in zip(taught, taught[1:], strict=False)
    ]
    assert equal == [False, True] * 4  # a new teacher where k falls, the same in both phases
    # The teacher's four steps to 32 and to 8, and two after that.
    for stage, (N, steps) in enumerate(((128, 4), (32, 4), (32, 4), (8, 2))):
        role = (
            (lambda row: state.roles.guided(TEACHER, of_row(batch, row), state.null, torch.tensor([3.0])))
            if stage == 0
            else (lambda row: state.roles.denoiser(PREVIOUS, of_row(batch, row)))
        )
        pair = pair_of(state, stage)
        torch.testing.assert_close(pair.target, walk(state, role, pair, N, steps), rtol=0, atol=5e-5)
    top = pair_of(state, 7, size=64)  # k = 1: every start is T, and pure noise
    assert set(top.times.t_n.tolist()) == {1000}
    assert abs(float((top.x_tn * make_batch(size=64).x0).mean())) < 0.03  # with the image in it: 0.068


def test_one_phase_knows_where_an_end_came_from_and_the_other_does_not(tmp_path):
    """Real: ends beside their own starts. Fake: the same ends beside each other's. Whatever does not see the start sees
    twice the same pictures, and its loss cannot fall below 2 log 2."""
    roles, batch = make_roles(micro("lightning", tmp_path)), make_batch(size=16)
    cond = type(batch.cond)(batch.cond.prompt_embeds[:1].expand(16, -1, -1))
    t, g = torch.full((16,), 500), torch.Generator().manual_seed(0)
    start = torch.randn(16, 4, 8, 8, generator=g)
    end = 0.9 * start + 0.1 * torch.randn(16, 4, 8, 8, generator=g)
    with torch.no_grad():
        seen = features(roles, end, t - 250, cond)
        own = features(roles, start, t, cond)
        others = [f.roll(1, dims=0) for f in own]
    ended = {}
    for conditional in (True, False):
        heads = LatentDiscriminator(MICRO_SD, seed=0, conditional=conditional)
        optimizer = torch.optim.Adam(heads.parameters(), lr=5e-3)
        for _ in range(30):
            real = heads.logits(seen, own if conditional else None)
            fake = heads.logits(seen, others if conditional else None)
            loss = discriminator_loss(real, fake, "non_saturating").mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ended[conditional] = float(loss.detach())
    assert ended[False] >= 2 * math.log(2) - 1e-6
    assert ended[True] < 0.7 * 2 * math.log(2)


def test_the_losses_see_the_start_in_one_phase_alone(tmp_path):
    roles, batch = make_roles(micro("lightning", tmp_path)), make_batch()
    t, end = torch.full((4,), 500), torch.full((4,), 250)
    g = torch.Generator().manual_seed(1)
    x, target, start, other = (torch.randn(4, 4, 8, 8, generator=g) for _ in range(4))
    for conditional in (True, False):
        heads = LatentDiscriminator(MICRO_SD, seed=0, conditional=conditional)
        losses = [
            adversarial_losses(
                roles, heads, Pair(x, target, Times(t, end, end, end), x_tn), batch.cond, "non_saturating", generator_of(0)
            )
            for x_tn in (start, other)
        ]  # fmt: skip
        assert torch.equal(losses[0][0], losses[1][0]) != conditional
        assert torch.equal(losses[0][1], losses[1][1]) != conditional


def test_rectified_flows_target_is_the_teachers_way_through_the_window(tmp_path):
    state, batch = training(micro("perflow", tmp_path)), make_batch()
    disturb(state.roles, STUDENT, 0)
    pair = pair_of(state, 0)
    assert set(pair.times.t_n.tolist()) <= {250, 500, 750, 1000}
    teacher = lambda row: state.roles.guided(TEACHER, of_row(batch, row), state.null, torch.tensor([3.0]))
    x_b = walk(state, teacher, pair, 32, 8)
    window = Window(pair.times.t_n, pair.times.t_end)
    alpha_top, sigma_top = state.roles.schedule.at(window.t_top)
    alpha_b, sigma_b = state.roles.schedule.at(window.t_b)
    eps = (x_b - alpha_b / alpha_top * pair.x_tn) / (sigma_b - alpha_b / alpha_top * sigma_top)
    torch.testing.assert_close(pair.target, eps, rtol=1e-3, atol=1e-3)
    # The student is asked on the line: its prediction is found there again, at some time of the window.
    found = []
    for t_b, t_top in zip(window.t_b.tolist(), window.t_top.tolist(), strict=True):
        rows = torch.arange(t_b + 1, t_top + 1)
        index = len(found)
        wide = lambda tensor, i=index, n=t_top - t_b: tensor[i : i + 1].expand(n, *tensor.shape[1:])
        own = Window(torch.full_like(rows, t_top), torch.full_like(rows, t_b))
        x_t = on_line(wide(pair.x_tn), wide(x_b), rows, own)
        with torch.no_grad():
            seen = state.roles.predict(
                STUDENT, x_t, rows, batch.cond.rows(slice(index, index + 1)).expand(len(rows))
            ).eps
        found.append(float((seen - pair.student[index]).abs().flatten(1).amax(1).min()))
    assert max(found) < 1e-4


def test_lcms_target_is_the_consistency_target_with_its_boundary(tmp_path):
    """k = 1 and t_end = 0; LCM's c_skip and c_out (sigma_data 0.5, time scaled by 10) are 0 and 1 on its 50 times."""
    state = training(micro("lcm", tmp_path))
    disturb(state.roles, "ema", 1)
    batch, pair = make_batch(), pair_of(state, 0)
    assert set(pair.times.t_end.tolist()) == {0} and set(pair.times.t_n.tolist()) <= set(range(20, 1001, 20))
    with torch.no_grad():
        omega = 2 + 2 * _omega_draws(state.config, batch)
        guided = state.roles.guided(TEACHER, batch.cond, state.null, omega)
        x_prev = ddim_step(state.roles.schedule, guided, pair.x_tn, pair.times.t_n, pair.times.t_prev)
        seen = state.roles.predict("ema", x_prev, pair.times.t_prev.clamp(min=1), batch.cond).x0
    index = (pair.times.t_prev - 1).clamp(min=0).view(-1, 1, 1, 1).float()  # the network's own time
    c_skip = 0.25 / ((10 * index) ** 2 + 0.25)
    c_out = 10 * index / ((10 * index) ** 2 + 0.25).sqrt()
    torch.testing.assert_close(pair.target, c_skip * x_prev + c_out * seen, rtol=1e-4, atol=1e-4)


def _omega_draws(config, batch, seed: int = 3) -> torch.Tensor:
    """The uniform numbers behind omega: times and noise are drawn before them."""
    g = generator_of(seed)
    torch.randint(1, config.distill.n_list[0] + 1, (len(batch.x0),), generator=g)
    torch.randn(batch.x0.shape, generator=g)
    return torch.rand(len(batch.x0), generator=g)


@pytest.mark.parametrize("inputs", ["data", "generated"])
def test_a_few_step_student_sets_out_from_each_of_its_steps(inputs, tmp_path):
    config = micro("turbo" if inputs == "data" else "dmd", tmp_path)
    assert config.inputs == inputs and config.starts == (1000, 750, 500, 250)
    state, clean = training(config), torch.full((256, 4, 8, 8), 2.0)
    batch = type(batch_of())(clean, batch_of().cond.rows(slice(1)).expand(256))
    state.roles.predict = lambda role, x_t, t, cond: _Constant(x_t, t)
    x_t, t = state._set_out(batch, generator_of(0))
    counts = {start: int((t == start).sum()) for start in config.starts}
    assert sum(counts.values()) == 256 and min(counts.values()) > 40
    for start in config.starts:
        alpha, sigma = (float(a) for a in (state.roles.schedule.alpha[start], state.roles.schedule.sigma[start]))
        mean, std = float(x_t[t == start].mean()), float(x_t[t == start].std())
        below = {"data": 2.0, "generated": -1.0}[inputs]  # what is noised: the images, or what the student made
        assert mean == pytest.approx(0.0 if start == 1000 else alpha * below, abs=0.05)
        assert std == pytest.approx(1.0 if start == 1000 else sigma, rel=0.05)


def test_only_rows_that_go_on_are_rolled_out(tmp_path):
    """The same x_t as when the student is asked for every row at every step, from fewer rows."""
    state, batch = training(micro("dmd", tmp_path)), batch_of()
    predict, asked = state.roles.predict, []
    state.roles.predict = lambda role, x_t, t, cond: asked.append(len(x_t)) or predict(role, x_t, t, cond)
    x_t, t = state._set_out(batch, generator_of(5))
    starts, g = state.config.starts, generator_of(5)
    whole, time = torch.randn(batch.x0.shape, generator=g), torch.full((len(batch.x0),), starts[0])
    chosen = torch.randint(len(starts), (len(whole),), generator=g)
    for index, start in enumerate(starts[1:], start=1):
        with torch.no_grad():
            clean = to_clean(state.roles, STUDENT, whole, time, batch.cond)
        noised = add_noise(
            state.roles.schedule, clean, torch.randn(whole.shape, generator=g), torch.full_like(time, start)
        )
        on = chosen >= index
        whole, time = (
            torch.where(on.view(-1, 1, 1, 1), noised, whole),
            torch.where(on, torch.full_like(time, start), time),
        )
    assert torch.equal(t, time)
    torch.testing.assert_close(x_t, whole, rtol=1e-4, atol=1e-4)
    assert asked[:3] == [max(1, int((chosen >= i).sum())) for i in (1, 2, 3)]


class _Constant:
    """A student that sees -1 in everything."""

    def __init__(self, x_t, t):
        self.x0 = torch.full_like(x_t, -1.0)
        self.eps = torch.zeros_like(x_t)


def test_turbos_distance_pulls_to_what_the_teacher_sees(tmp_path):
    """From networks evaluated here: alpha_t times the squared distance, at t drawn as distribution matching draws it."""
    state, x = training(micro("turbo", tmp_path)), torch.randn(4, 4, 8, 8, requires_grad=True)
    cond = batch_of().cond
    state.matching_loss(x, cond, generator_of(1)).backward()
    g = generator_of(1)
    t = torch.randint(20, 981, (4,), generator=g)
    alpha, _ = state.roles.schedule.at(t)
    with torch.no_grad():
        x_t = add_noise(state.roles.schedule, x, torch.randn(x.shape, generator=g), t)
        seen, null = (state.roles.predict(TEACHER, x_t, t, c).x0 for c in (cond, state.null.expand(4)))
    expected = 2 * alpha * (x.detach() - (null + 3.0 * (seen - null))) / x.numel()
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-6)
