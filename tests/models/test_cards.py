"""The lines that a model card and a LoRA's usage hold, run as they stand."""

from __future__ import annotations

import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel

from hypersd_ray.models.cards import UNetCard, UNetSampling, read_sampling, save_unet_with_card, unet_usage
from hypersd_ray.models.checkpoint import read_base
from hypersd_ray.models.export import merge_lora, save_diffusers_lora, usage
from hypersd_ray.models.lora import Adapters
from hypersd_ray.models.lora_file import TIMESTEP, LoRAMetadata
from hypersd_ray.recipes.tscd import tiny
from hypersd_ray.trainer.kinds.tscd import unet_card
from tests.helpers.pipelines import call, random_inputs, randomize, tiny_unet


def lora_of(family):
    adapters = Adapters(tiny_unet(family), 4, 4.0)
    adapters.add("student", trainable=False)
    return randomize(adapters, "student", size=0.02)


def run_lines(lines: str) -> dict:
    """What the lines leave behind, with small noise-free calls."""
    space: dict = {}
    *setup, draw = lines.splitlines()
    exec("\n".join(setup), space)
    space["pipe"].set_progress_bar_config(disable=True)
    if hasattr(space["pipe"], "safety_checker"):
        space["pipe"].safety_checker = None
    space["told"] = []
    original = space["pipe"].unet.forward

    def forward(sample, timestep, *args, **kwargs):
        space["told"].append(int(timestep))
        return original(sample, timestep, *args, **kwargs)

    space["pipe"].unet.forward = forward
    torch.manual_seed(0)
    exec(draw, space)
    return space


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_cards_lines_run_the_single_step_at_800(family, folders, tmp_path):
    unet, tensors = tiny_unet(family), lora_of(family)
    merge_lora(unet, tensors, 4.0)
    card = UNetCard(str(folders[family]), read_base(folders[family]), (800,), "tiny", "LCMScheduler")
    folder = save_unet_with_card(unet, tmp_path / "unet", str(tmp_path / "unet"), card)
    assert read_sampling(folder) == UNetSampling("LCMScheduler", (800,)) and read_sampling(folders[family]) is None
    text = (folder / "README.md").read_text()
    lines = text.split("```python\n")[1].split("\n```")[0]
    assert lines == unet_usage(folder, card)
    space = run_lines(lines)
    assert space["told"] == [800] and isinstance(space["pipe"].scheduler, LCMScheduler)
    loaded = UNet2DConditionModel.from_pretrained(folder)
    x_t, t, cond = random_inputs(family)
    assert torch.equal(call(loaded.eval(), x_t, t, cond), call(unet, x_t, t, cond))

    metadata = LoRAMetadata(
        base_model="tiny", family=family, k=1, steps=(1,), scheduler="LCMScheduler", eta=0.0, rank=4, alpha=4.0,
        extra={TIMESTEP: "800"},
    )  # fmt: skip
    path = save_diffusers_lora(tensors, tmp_path / "lora.safetensors", metadata)
    lora = run_lines(usage(path, metadata, base=folders[family]))
    assert lora["told"] == [800]
    a, b = (torch.tensor(list(s["image"].getdata())).float() for s in (space, lora))
    assert (a - b).abs().max() <= 1  # the merged UNet and the LoRA draw one picture


def test_a_unified_unets_lines_run_too(folders, tmp_path):
    card = UNetCard(str(folders["sd"]), read_base(folders["sd"]), (), "tiny", "TCDScheduler")
    folder = save_unet_with_card(tiny_unet("sd"), tmp_path / "unet", str(tmp_path / "unet"), card)
    assert run_lines(unet_usage(folder, card))["told"] == [999, 749, 499, 249]
    assert read_sampling(folder) == UNetSampling("TCDScheduler", ())
    (folder / "sampling.json").write_text("{}")
    with pytest.raises(ValueError, match=r"sampling\.json cannot be read: 'scheduler'"):
        read_sampling(folder)


@pytest.mark.parametrize(
    ("method", "k", "keep_cfg", "scheduler"),
    [
        ("tscd", 1, False, "TCDScheduler"),
        ("tscd", 8, True, "TCDScheduler"),
        ("pd", 2, False, "DDIMScheduler"),
        ("lcm", 1, False, "LCMScheduler"),
    ],
)
def test_a_stages_unet_says_how_it_was_made_to_be_sampled(method, k, keep_cfg, scheduler, folders, tmp_path):
    config = tiny(method=method, keep_cfg=keep_cfg).model_copy(update={"teacher": str(folders["sd"])})
    card = unet_card(config, k)
    folder = save_unet_with_card(tiny_unet("sd"), tmp_path / "unet", str(tmp_path / "unet"), card)
    extra = {"guidance": "kept"} if keep_cfg else {}
    assert read_sampling(folder) == UNetSampling(scheduler, (), card.eta, extra)
    text = (folder / "README.md").read_text()
    lines = text.split("```python\n")[1].split("\n```")[0]
    assert f"in {k} step" in text and f"num_inference_steps={k}, guidance_scale={3 if keep_cfg else 0}" in lines
    assert f"pipe.scheduler = {scheduler}." in lines
    if scheduler == "DDIMScheduler":  # the tests above run the others' lines
        assert run_lines(lines)["told"] == [999, 499]
