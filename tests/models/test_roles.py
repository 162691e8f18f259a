"""One UNet, many roles: what each predicts, and that they do not touch one another."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler

from hypersd_ray.diffusion.schedule import scaled_linear
from hypersd_ray.models.conditioning import Conditioning, concatenate, size_time_ids, square_time_ids
from hypersd_ray.models.roles import EMA, PREVIOUS, STUDENT, TEACHER, FullRoles, LoRARoles
from tests.helpers.distil import student_parameters
from tests.helpers.pipelines import BETAS, call, random_inputs, randomize, tiny_unet


def lora_roles(family="sd", parameterization="epsilon", dtype=torch.float32):
    return LoRARoles(tiny_unet(family).to(dtype), scaled_linear(), parameterization, rank=4, alpha=6.0)


def full_roles(family="sd", parameterization="epsilon", dtype=torch.float32):
    return FullRoles(tiny_unet(family).to(dtype), scaled_linear(), parameterization)


BOTH = pytest.mark.parametrize("make", [lora_roles, full_roles], ids=["lora", "full"])


def disturb(roles, role, seed):
    """Move `role` away from the base."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in roles.named_tensors(role).values():
            p.add_(0.03 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("parameterization", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_predict_is_the_schedulers_pred_original_sample(family, parameterization):
    roles = lora_roles(family, parameterization)
    x_t, _, cond = random_inputs(family, batch=3)
    t = torch.tensor([1, 500, 1000])
    prediction = roles.predict(TEACHER, x_t, t, cond)
    output = call(tiny_unet(family), x_t, t, cond)
    scheduler = DDIMScheduler(**BETAS, prediction_type=parameterization, clip_sample=False)
    scheduler.set_timesteps(1000)
    for i in range(3):
        # diffusers' index is our t - 1
        x0 = scheduler.step(output[i : i + 1], int(t[i]) - 1, x_t[i : i + 1]).pred_original_sample
        # its float32 alphas_cumprod is good to 6e-5, see tests/diffusion
        torch.testing.assert_close(prediction.x0[i : i + 1], x0, rtol=1e-3, atol=1e-3)
    alpha, sigma = roles.schedule.at(t)
    torch.testing.assert_close(alpha * prediction.x0 + sigma * prediction.eps, x_t, rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_guidance_in_one_batch_is_two_passes(make, family):
    roles = make(family)
    x_t, t, cond = random_inputs(family)
    _, _, other = random_inputs(family, batch=1, seed=5)
    null = Conditioning(other.prompt_embeds, other.pooled)
    omega = torch.tensor([1.0, 7.5])
    with torch.no_grad():
        guided = roles.guided(TEACHER, cond, null, omega)(x_t, t)
        with_prompt = roles.predict(TEACHER, x_t, t, cond)
        without = roles.predict(TEACHER, x_t, t, null.expand(2).with_time_ids(cond.time_ids))
    scale = omega.view(2, 1, 1, 1)
    for name in ("x0", "eps"):
        a, b = getattr(with_prompt, name), getattr(without, name)
        torch.testing.assert_close(getattr(guided, name), b + scale * (a - b), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(guided.x0[0], with_prompt.x0[0], rtol=1e-4, atol=1e-4)  # omega = 1
    assert (guided.x0[1] - with_prompt.x0[1]).abs().max() > 1e-3


def test_sdxl_is_told_size_and_pooled_text():
    roles = lora_roles("sdxl")
    x_t, t, cond = random_inputs("sdxl")
    with torch.no_grad():
        eps = roles.predict(TEACHER, x_t, t, cond).eps
        for other in (
            cond.with_time_ids(cond.time_ids.flip(1)),
            Conditioning(cond.prompt_embeds, cond.pooled + 1, cond.time_ids),
            Conditioning(cond.prompt_embeds + 1, cond.pooled, cond.time_ids),
        ):
            assert (roles.predict(TEACHER, x_t, t, other).eps - eps).abs().max() > 1e-3


def test_the_size_of_an_uncropped_picture():
    assert size_time_ids(768, 1344, 2).tolist() == 2 * [[768.0, 1344.0, 0.0, 0.0, 768.0, 1344.0]]
    assert square_time_ids(1024, 1).tolist() == [[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]]


def test_sizes_stay_exact_in_bfloat16():
    # 1365 has no bfloat16 (1368 is next); the sine of the difference is another embedding
    _, _, cond = random_inputs("sdxl")
    half = cond.cast(torch.bfloat16)
    assert half.prompt_embeds.dtype == half.pooled.dtype == torch.bfloat16
    assert torch.equal(half.time_ids, cond.time_ids)
    roles = lora_roles("sdxl", dtype=torch.bfloat16)
    x_t, t, _ = random_inputs("sdxl")
    with torch.no_grad():
        a = roles.predict(STUDENT, x_t, t, cond).eps
        b = roles.predict(STUDENT, x_t, t, cond.with_time_ids(cond.time_ids.bfloat16())).eps
    assert a.dtype == torch.float32
    assert not torch.equal(a, b)


def test_conditioning_parts_travel_together():
    _, _, cond = random_inputs("sdxl", batch=1)
    both = concatenate(cond, cond.expand(2))
    assert [len(p) for p in (both.prompt_embeds, both.pooled, both.time_ids)] == [3, 3, 3]
    _, _, plain = random_inputs("sd")
    assert plain.added_kwargs() is None
    assert concatenate(plain, plain).pooled is None
    assert plain.to(torch.float64).prompt_embeds.dtype == torch.float64


@BOTH
def test_roles_are_apart(make):
    roles = make()
    x_t, t, cond = random_inputs("sd")
    bare = call(tiny_unet("sd"), x_t, t, cond)

    @torch.no_grad()
    def eps(role):
        return roles.predict(role, x_t, t, cond).eps

    assert torch.equal(eps(TEACHER), bare)
    assert torch.equal(eps(STUDENT), bare)
    assert torch.equal(eps(EMA), bare)
    disturb(roles, STUDENT, seed=1)
    student = eps(STUDENT)
    assert (student - bare).abs().max() > 1e-3
    assert torch.equal(eps(TEACHER), bare)  # bit for bit, whatever the student became
    assert torch.equal(eps(EMA), bare)
    roles.add(PREVIOUS, like=STUDENT)
    assert torch.equal(eps(PREVIOUS), student)
    disturb(roles, STUDENT, seed=2)
    assert torch.equal(eps(PREVIOUS), student)
    assert not torch.equal(eps(STUDENT), student)
    roles.copy(STUDENT, EMA)
    assert torch.equal(eps(EMA), eps(STUDENT))


@BOTH
def test_only_the_student_is_trainable(make):
    roles = make()
    roles.add(PREVIOUS, like=STUDENT)
    disturb(roles, STUDENT, seed=1)
    x_t, t, cond = random_inputs("sd")
    for role in (TEACHER, EMA, PREVIOUS):
        assert not roles.predict(role, x_t, t, cond).eps.requires_grad
    roles.predict(STUDENT, x_t, t, cond).eps.square().mean().backward()
    trainable = student_parameters(roles)
    assert all(p.requires_grad and p.grad is not None for p in trainable)
    assert all(p.grad is None for role in (EMA, PREVIOUS) for p in roles.named_tensors(role).values())
    with roles.playing(TEACHER) as network:
        others = {id(p) for p in trainable}
        assert all(p.grad is None and not p.requires_grad for p in network.parameters() if id(p) not in others)


@BOTH
def test_ema_formula(make):
    # Algorithm 1, line 16: mu = 0.9 twice from e0 to students s1, s2 is 0.81 e0 + 0.09 s1 + 0.1 s2
    roles = make()
    e0 = [p.detach().clone() for p in roles.named_tensors(EMA).values()]
    students = []
    for seed in (1, 2):
        disturb(roles, STUDENT, seed)
        students.append([p.detach().clone() for p in roles.named_tensors(STUDENT).values()])
        roles.ema_update(0.9)
    for i, average in enumerate(roles.named_tensors(EMA).values()):
        torch.testing.assert_close(average, 0.81 * e0[i] + 0.09 * students[0][i] + 0.1 * students[1][i])
        assert torch.equal(list(roles.named_tensors(STUDENT).values())[i], students[1][i])
    disturb(roles, STUDENT, 3)
    roles.ema_update(0.0)
    pairs = zip(roles.named_tensors(EMA).values(), roles.named_tensors(STUDENT).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@BOTH
def test_load_brings_a_role_back(make):
    roles, fresh = make(), make()
    disturb(roles, STUDENT, 1)
    saved = {n: p.detach().clone() for n, p in roles.named_tensors(STUDENT).items()}
    fresh.load(STUDENT, saved)
    x_t, t, cond = random_inputs("sd")
    with torch.no_grad():
        assert torch.equal(roles.predict(STUDENT, x_t, t, cond).eps, fresh.predict(STUDENT, x_t, t, cond).eps)
    assert all(p.requires_grad for p in student_parameters(fresh))


@BOTH
def test_load_names_what_does_not_fit(make):
    roles = make()
    before = {n: p.detach().clone() for n, p in roles.named_tensors(STUDENT).items()}
    first, last = next(iter(before)), list(before)[-1]
    reshaped = {n: torch.ones_like(v) for n, v in before.items()} | {last: torch.zeros(3, 5)}
    for wrong, named in (
        ({n: v for n, v in before.items() if n != first}, first),
        (before | {"extra.weight": torch.zeros(1)}, "extra.weight"),
        (reshaped, last),
    ):
        with pytest.raises(ValueError, match=r"base model|rank") as error:
            roles.load(STUDENT, wrong)
        assert named in str(error.value)
        assert "\n" not in str(error.value)
    assert all(torch.equal(p, before[n]) for n, p in roles.named_tensors(STUDENT).items())  # nothing half loaded


def test_roles_in_bfloat16_keep_float32_masters():
    for make in (lora_roles, full_roles):
        roles = make(dtype=torch.bfloat16)
        x_t, t, cond = random_inputs("sd")
        assert roles.dtype == torch.bfloat16
        assert {p.dtype for role in (STUDENT, EMA) for p in roles.named_tensors(role).values()} == {torch.float32}
        with torch.no_grad():
            teacher, student = (roles.predict(role, x_t, t, cond) for role in (TEACHER, STUDENT))
        assert teacher.x0.dtype == student.x0.dtype == torch.float32
        # the same weights; the full copy under autocast keeps norms in float32
        error = (teacher.eps - student.eps).square().mean().sqrt() / teacher.eps.square().mean().sqrt()
        assert error < 0.05, make
        disturb(roles, STUDENT, 1)
        roles.predict(STUDENT, x_t, t, cond).eps.square().mean().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in student_parameters(roles))


def test_the_student_steps_and_the_base_stays():
    roles = lora_roles()
    base = copy.deepcopy({n: p for n, p in roles.unet.named_parameters() if ".A." not in n and ".B." not in n})
    randomize(roles.adapters, STUDENT)
    optimiser = torch.optim.AdamW(student_parameters(roles), lr=1e-2)
    x_t, t, cond = random_inputs("sd")
    before = [p.detach().clone() for p in student_parameters(roles)]
    roles.denoiser(STUDENT, cond)(x_t, t).x0.square().mean().backward()
    optimiser.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, student_parameters(roles), strict=True))
    assert all(torch.equal(base[n], dict(roles.unet.named_parameters())[n]) for n in base)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointed_activations_give_the_same_gradients_from_less_memory(make, dtype):
    x_t, t, cond = random_inputs("sd")
    found = []
    for checkpointing in (False, True):
        roles = make(dtype=dtype)
        disturb(roles, STUDENT, 1)
        disturb(roles, EMA, 2)
        if checkpointing:
            roles.checkpoint_activations()
        kept = {}

        def pack(x, kept=kept):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            student = roles.predict(STUDENT, x_t, t, cond).eps
            # as the adversarial loss does: on through the base, to the student
            judged = roles.predict(TEACHER, student, t, cond).eps
        with roles.playing(EMA):  # the backward pass is not the student's only because the switch says so
            judged.square().mean().backward()
        found.append((judged.detach(), [p.grad for p in student_parameters(roles)], sum(kept.values())))
    (a, gradients, more), (b, again, less) = found
    assert torch.equal(a, b)
    assert all(torch.equal(x, y) for x, y in zip(gradients, again, strict=True))
    assert less < 0.8 * more
