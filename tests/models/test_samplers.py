"""diffusers' schedulers as students are sampled by them."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler

from hypersd_ray.models.export import sampling_arguments
from hypersd_ray.models.samplers import SCHEDULERS, diffusers_scheduler, scheduler_options

MADE = [
    ("tcd", (), TCDScheduler, {"original_inference_steps": 40}),
    ("lcm", (), LCMScheduler, {"original_inference_steps": 40}),
    ("lcm", (800,), LCMScheduler, {}),
    ("ddim", (), DDIMScheduler, {"timestep_spacing": "trailing", "clip_sample": False}),
]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize(("sampler", "timesteps", "kind", "options"), MADE)
def test_it_is_what_a_user_makes(folders, family, sampler, timesteps, kind, options):
    """From the folder, and from the config of another scheduler on it, as a pipeline has one."""
    folder = folders[family]
    theirs = kind.from_pretrained(folder, subfolder="scheduler", **options)
    before = TCDScheduler.from_pretrained(folder, subfolder="scheduler")
    for base in (folder, str(folder), before.config):
        ours = diffusers_scheduler(sampler, base, timesteps)
        assert type(ours) is kind
        assert {name: ours.config[name] for name in options} == options
        assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(timesteps=list(timesteps)) if timesteps else scheduler.set_timesteps(4)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
        assert theirs.timesteps.tolist() == (list(timesteps) or [999, 749, 499, 249])
    assert dict(diffusers_scheduler(sampler, folder, timesteps).config) == dict(theirs.config)


@pytest.mark.parametrize(("sampler", "timesteps"), [made[:2] for made in MADE])
def test_users_are_told_to_make_the_same(sampler, timesteps):
    told, _ = sampling_arguments(SCHEDULERS[sampler].__name__, 1, timesteps, 0.0, {})
    assert eval(f"dict({told.removeprefix(', ')})") == scheduler_options(sampler, timesteps)
