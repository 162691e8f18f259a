"""What each method's run leaves, and how it is to be sampled: in our sampler and in diffusers'."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from hypersd_ray.config.base import ConfigError
from hypersd_ray.diffusion.schedule import Schedule
from hypersd_ray.diffusion.segments import edges
from hypersd_ray.models.export import usage
from hypersd_ray.models.samplers import TCD_GRID
from hypersd_ray.recipes import METHODS
from hypersd_ray.recipes.compare import TRAININGS
from hypersd_ray.trainer.kinds import KINDS, kind_of, tscd
from hypersd_ray.trainer.kinds.onestep import onestep_metadata
from hypersd_ray.training.samples import Sampling
from tests.helpers.pipelines import BETAS

# method -> scheduler, steps of the last stage's LoRA
METADATA = {
    "lcm": ("LCMScheduler", (1, 2, 4, 8)),
    "tcd": ("TCDScheduler", (1, 2, 4, 8)),
    "tscd": ("TCDScheduler", (1, 2, 4, 8)),
    "perflow": ("DDIMScheduler", (4,)),
    "pd": ("DDIMScheduler", (1,)),
    "lightning": ("DDIMScheduler", (1,)),
}


@pytest.mark.parametrize("method", METADATA)
def test_a_lora_says_how_it_is_sampled(method):
    config = METHODS[method]().first
    metadata = tscd.lora_metadata(config, config.distill.k_list[-1])
    assert (metadata.scheduler, metadata.steps) == METADATA[method]
    assert metadata.eta == (1.0 if method == "lcm" else 0.0)
    lines = usage("x.safetensors", metadata)
    assert metadata.scheduler in lines and f"num_inference_steps={metadata.steps[0]}" in lines
    assert ("trailing" in lines) == (metadata.scheduler == "DDIMScheduler")
    assert (f"original_inference_steps={TCD_GRID}" in lines) == (metadata.scheduler in ("LCMScheduler", "TCDScheduler"))


@pytest.mark.parametrize("method", ["turbo", "dmd"])
def test_a_few_step_lora_names_its_inputs(method):
    metadata = onestep_metadata(METHODS[method]().first)
    assert (metadata.scheduler, metadata.steps) == ("LCMScheduler", (4,))
    assert "num_inference_steps=4, timesteps=[999, 749, 499, 249]" in usage("x.safetensors", metadata)


@pytest.mark.parametrize(
    ("method", "products"),
    [
        ("lcm", ["lcm-k1"] * 4),
        ("perflow", ["perflow-k4"] * 4),
        ("pd", ["pd-k1", "pd-k2", "pd-k4", "pd-k8"]),
        ("lightning", ["lightning-k1", "lightning-k2", "lightning-k4", "lightning-k8"]),
        ("tscd", ["tscd-k1", "tscd-k2", "tscd-k4", "tscd-k8"]),
        ("turbo", ["fewstep-4"] * 4),
    ],
)
def test_each_number_of_steps_has_its_product(method, products):
    config = METHODS[method]().first
    kind = KINDS[kind_of(config)]
    assert [kind.product(config, steps) for steps in (1, 2, 4, 8)] == [f"lora/{name}.safetensors" for name in products]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("lcm", [Sampling(n, eta=1.0) for n in (8, 4, 2, 1)]),
        ("tcd", [Sampling(n) for n in (8, 4, 2, 1)]),
        ("lightning", [Sampling(n) for n in (8, 4, 2, 1)]),
        ("perflow", [Sampling(8, windows=4), Sampling(4, windows=4), Sampling(2), Sampling(1)]),
        ("turbo", [Sampling(4, (1000, 750, 500, 250, 0), 1.0), Sampling(2, (1000, 500, 0), 1.0), Sampling(1, (1000, 0))]),
    ],
)  # fmt: skip
def test_samplings(method, expected):
    config = METHODS[method]().first
    assert KINDS[kind_of(config)].samplings(config) == expected


def test_a_student_of_more_segments_than_one_goes_to_their_starts_without_noise():
    config = TRAININGS["tscd-segment-start"]().first
    assert KINDS[kind_of(config)].samplings(config) == [Sampling(8), Sampling(4), Sampling(2), Sampling(1, eta=1.0)]


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_diffusers_schedulers_run_on_the_edges(steps):
    """What `usage` prints: LCMScheduler on its grid of 40, DDIM with trailing spacing; the network's input is t - 1."""
    expected = [t - 1 for t in edges(1000, steps)[:0:-1]]
    lcm = LCMScheduler(**BETAS, original_inference_steps=TCD_GRID)
    ddim = DDIMScheduler(**BETAS, timestep_spacing="trailing", clip_sample=False)
    for scheduler in (lcm, ddim):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == expected


def test_lines_need_a_noise_at_the_top(monkeypatch):
    config, info = METHODS["perflow"]().first, tscd.read_base(METHODS["perflow"]().first.teacher)
    tscd.check(config)
    sigma = torch.arange(1001, dtype=torch.float64) / 1000
    ends_at_zero = replace(info, schedule=Schedule(1 - sigma, sigma))
    monkeypatch.setattr(tscd, "read_base", lambda teacher: ends_at_zero)
    with pytest.raises(ConfigError, match=r"distill\.path='straight'.*alpha = 0.*'ode'"):
        tscd.check(config)
