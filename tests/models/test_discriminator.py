"""The latent discriminator sees what the real UNet computes, and trains its heads only."""

import copy

import pytest
import torch

from hypersd_ray.diffusion.schedule import scaled_linear
from hypersd_ray.losses.adversarial import discriminator_loss, generator_loss
from hypersd_ray.models.discriminator import LatentDiscriminator, features, unet_encoder
from hypersd_ray.models.roles import STUDENT, FullRoles, LoRARoles
from tests.helpers.distil import student_parameters
from tests.helpers.pipelines import TINY_SD, TINY_SDXL, call, random_inputs, randomize, tiny_unet

CONFIGS = {"sd": TINY_SD, "sdxl": TINY_SDXL}


@pytest.mark.parametrize("family", CONFIGS)
def test_features_are_what_hooks_on_the_real_forward_see(family):
    unet = tiny_unet(family)
    x_t, t, cond = random_inputs(family)
    seen = []

    def keep(module, args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(keep) for block in [*unet.down_blocks, unet.mid_block]]
    with torch.no_grad():
        call(unet, x_t, t, cond)
        for hook in hooks:
            hook.remove()
        ours = unet_encoder(unet, x_t, t - 1, cond)
    assert len(ours) == len(seen) == len(CONFIGS[family]["block_out_channels"]) + 1
    assert all(torch.equal(a, b) for a, b in zip(ours, seen, strict=True))


@pytest.mark.parametrize("family", CONFIGS)
def test_features_are_the_bases_whatever_the_student_is(family):
    unet = tiny_unet(family)
    x_t, t, cond = random_inputs(family)
    with torch.no_grad():
        bare = unet_encoder(copy.deepcopy(unet), x_t, t - 1, cond)
    roles = LoRARoles(unet, scaled_linear(), "epsilon", rank=4, alpha=6.0)
    randomize(roles.adapters, STUDENT)
    with torch.no_grad(), roles.playing(STUDENT):
        ours = features(roles, x_t, t, cond)
        assert roles.adapters.switch.role == STUDENT
    assert all(torch.equal(a, b) for a, b in zip(ours, bare, strict=True))
    with torch.no_grad():  # and they know the time and the text
        for other in (
            features(roles, x_t, (t + 300) % 1000 + 1, cond),
            features(roles, x_t, t, type(cond)(cond.prompt_embeds + 1, cond.pooled, cond.time_ids)),
        ):
            assert not torch.equal(other[-1], bare[-1])


@pytest.mark.parametrize("make", [lambda u, s, p: LoRARoles(u, s, p, rank=4, alpha=6.0), FullRoles])
def test_who_gets_gradient(make):
    roles = make(tiny_unet("sd"), scaled_linear(), "epsilon")
    discriminator = LatentDiscriminator(TINY_SD, seed=0)
    x_t, t, cond = random_inputs("sd")
    x_t.requires_grad_(True)
    fake = features(roles, x_t, t, cond)
    with torch.no_grad():
        real = features(roles, x_t + 1, t, cond)

    loss = discriminator_loss(
        discriminator.logits(real), discriminator.logits([f.detach() for f in fake]), "non_saturating"
    ).mean()
    loss.backward()
    assert all(p.grad is not None for p in discriminator.parameters())
    assert x_t.grad is None
    discriminator.zero_grad()

    discriminator.requires_grad_(False)
    generator_loss(discriminator.logits(fake), "non_saturating").mean().backward()
    assert x_t.grad.abs().max() > 0
    assert all(p.grad is None for p in discriminator.parameters())
    assert all(p.grad is None for p in roles.unet.parameters())
    assert all(p.grad is None for p in student_parameters(roles))


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_one_float32_map_a_level(family):
    discriminator = LatentDiscriminator(CONFIGS[family], seed=0)
    unet = tiny_unet(family).to(torch.bfloat16)
    roles = LoRARoles(unet, scaled_linear(), "epsilon", rank=4, alpha=6.0)
    x_t, t, cond = random_inputs(family)
    seen = features(roles, x_t, t, cond)
    logits = discriminator.logits(seen)
    assert [tuple(a.shape) for a in logits] == [(2, 1, *f.shape[2:]) for f in seen]
    assert {a.dtype for a in logits} == {torch.float32}
    assert {f.dtype for f in seen} == {torch.bfloat16}


def test_heads_are_a_function_of_the_seed_and_leave_the_global_state_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = LatentDiscriminator(TINY_SD, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = LatentDiscriminator(TINY_SD, seed=5), LatentDiscriminator(TINY_SD, seed=6)
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    weight = "heads.0.layers.0.weight"
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])
