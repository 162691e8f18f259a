"""The memory plan against what the embedded model's training holds; what it says when nothing fits."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.config.zero import ZeroConfig
from hypersd_ray.embedded import paths
from hypersd_ray.embedded.text import MAX_TOKENS
from hypersd_ray.models.checkpoint import read_base
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.shapes import SDXL_UNET
from hypersd_ray.trainer.kinds import onestep
from hypersd_ray.trainer.kinds.base import Place
from hypersd_ray.training.allocations import Allocations
from hypersd_ray.training.memory_plan import Plan, cheapest, plan, sizes_of, ways
from hypersd_ray.training.memory_report import Model, report
from hypersd_ray.training.tscd import Batch
from tests.helpers.pipelines import MICRO_SD
from tests.training import onestep_parts
from tests.training.zero_parts import together

MODEL = Model(MICRO_SD | {"in_channels": 4}, 8, MAX_TOKENS)
TINY = Model(read_base(paths.TEACHER).unet_config, 8, MAX_TOKENS)
BUCKET = 100_000
WAYS: list[dict[str, Any]] = [
    {},
    {"stage": 1, "bucket": BUCKET},
    {"stage": 2, "offload": True, "bucket": BUCKET},
    {"stage": 3, "teacher": True, "bucket": BUCKET},
]


def embedded(workers: int, zero: dict[str, Any]) -> OneStepConfig:
    """The embedded model trained in full, 2 parts of 4 rows each a worker."""
    return OneStepConfig.model_validate({
        "teacher": str(paths.TEACHER), "data": {"shards": "x.tar"}, "full_unet": True, "zero": zero,
        "distill": {"k_list": (1,), "n_list": (20,), "steps_list": (10,), "omega_min": 2, "omega_max": 3},
        "dmd": {"guidance": 2.0, "fake_updates": 1, "warmup_share": 0.0},
        "optim": {"lr": 1e-4, "batch": 8 * workers, "accumulation": 2}, "run": {"workers": workers},
    })  # fmt: skip


def _hold(rank: int, world: int, folder: Path) -> list[int]:
    """The most that the second step holds, in each way."""
    found = []
    for zero in WAYS:
        g = torch.Generator().manual_seed(rank)
        with Allocations() as held:
            training = onestep.build(embedded(world, zero), Place(torch.device("cpu"), rank))
            for _ in range(2):
                gc.collect()
                held.peak = held.now
                text = torch.randn(8, TINY.tokens, TINY.unet_config["cross_attention_dim"], generator=g)
                training.step(Batch(torch.randn(8, 4, TINY.size, TINY.size, generator=g), Conditioning(text)))
        found.append(held.peak)
        del training
        gc.collect()
    return found


@pytest.mark.processes
def test_the_plan_is_what_training_holds(tmp_path):
    """All in one memory here: the GPU's and the CPU's together."""
    for zero, peak in zip(WAYS, together(_hold, 2, tmp_path)[0], strict=True):
        config = embedded(2, zero)
        made = plan(config, TINY.unet_config, TINY.size, 2, config.zero, TINY.tokens)
        assert (made.total + made.host) / peak == pytest.approx(1, abs=0.08), (zero, made.gpu, made.cpu, peak)


def test_sizes_of_sdxl():
    """2.57 billion weights; its largest block is a transformer block of width 1280 or a residual one."""
    sizes = sizes_of(SDXL_UNET | {"in_channels": 4}, ZeroConfig(stage=3))
    assert sizes.all == 2_567_463_684
    assert sizes.small < 0.01 * sizes.all and sizes.largest < sizes.block < 0.02 * sizes.all


def test_the_cheapest_sends_least_of_those_that_fit():
    plans = [Plan(ZeroConfig(stage=stage), moved=moved) for stage, moved in ((1, 3.0), (2, 2.0), (3, 1.0))]
    for made, held in zip(plans, (5.0, 7.0, 9.0), strict=True):
        made.gpu["weights"] = held
    assert [cheapest(plans, room) for room in (4, 6, 8, 10)] == [None, *plans]


def test_offload_and_stages_take_less_from_the_gpu(tmp_path):
    config = onestep_parts.config(tmp_path, full_unet=True, run={"workers": 4}, optim={"batch": 16})
    plans = [plan(config, MODEL.unet_config, 8, 4, way, 77) for way in ways(ZeroConfig(bucket=1000))]
    of = {(made.zero.stage, made.zero.offload): made for made in plans}
    assert of[0, False].total > of[1, False].total >= of[2, False].total > of[3, False].total
    for stage in (1, 2, 3):
        assert of[stage, True].total < of[stage, False].total and of[stage, True].host > of[stage, False].host == 0


def test_the_report_names_the_way_or_the_knob(tmp_path):
    config = onestep_parts.config(tmp_path, full_unet=True, run={"workers": 2}, optim={"batch": 64})
    said = report(config, MODEL, gpu_memory=1000)
    assert said.splitlines()[-1].endswith("--zero.stage 0") and "does not fit" not in said
    least = min(plan(config, MODEL.unet_config, 8, 2, way, MODEL.tokens).total for way in ways(config.zero)) / 1e9
    with pytest.raises(ConfigError, match=r"the least is .*: set --optim\.(checkpointing|accumulation)") as found:
        report(config, MODEL, gpu_memory=0.97 * least)
    assert "\n" not in str(found.value)
    with pytest.raises(ConfigError, match="more GPUs"):
        report(config, MODEL, gpu_memory=1e-6)


def test_what_is_fake_counts_and_what_is_meta_does_not():
    with Allocations() as held:
        kept = torch.zeros(1000)
        also = torch.empty(500, device="meta")
        assert held.now == 4000 and also.numel() == 500
        del kept
        assert (held.now, held.peak) == (0, 4000)
