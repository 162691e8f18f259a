"""SD1.5's and SDXL's real names and shapes, on the meta device: the released LoRAs' size in bytes."""

import math

import pytest
import torch
from diffusers import UNet2DConditionModel

from hypersd_ray.models.lora import Adapters
from hypersd_ray.models.lora_file import module_of
from hypersd_ray.models.shapes import SD15_UNET, SDXL_UNET


@pytest.mark.parametrize(
    ("config", "modules", "megabytes"),
    [(SD15_UNET, 278, 269.0), (SDXL_UNET, 788, 787.0)],
    ids=["sd15", "sdxl"],
)
def test_rank_64_on_lcm_targets_has_the_released_size(config, modules, megabytes, monkeypatch):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    # 197 million random numbers would be drawn, only to be thrown away
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.empty(shape, device="meta"))
    adapters = Adapters(unet, rank=64, alpha=64)
    adapters.add("student", trainable=True)
    tensors = adapters.named_tensors("student")
    assert len(tensors) == 2 * modules
    parameters = sum(math.prod(p.shape) for p in tensors.values())
    # 67,252,224 and 196,751,360 numbers of 4 bytes
    assert parameters * 4 / 1e6 == pytest.approx(megabytes, abs=0.05)
    # Kohya's names of all of them lead back to the module
    assert all(module_of(name.replace(".", "_")) == name for name in adapters.layers)
