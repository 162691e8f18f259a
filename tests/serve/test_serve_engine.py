"""The engine makes what diffusers' pipelines make, whatever an image is batched with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)
from PIL import Image

from hypersd_ray.embedded import paths
from hypersd_ray.models.samplers import TCD_GRID
from serve.discovery import read_catalog
from serve.engine import Abandoned, Engine
from serve.settings import ModelSettings
from serve.work import BatchKey, Shot
from tests.serve.loras import write_lora

PROMPTS = ["a noto penguin on a yellow background", "a twemoji red apple", "a noto pizza on a blue background"]


def key_of(steps=4, lora="k1", scale=1.0, eta=0.0, guided=False, control=None, side=32) -> BatchKey:
    return BatchKey(side, side, steps, eta, lora, scale, guided, control)


def run(engine: Engine, key: BatchKey, shots, **options):
    lora = None if key.lora == "none" else engine.load_lora(key.lora)
    return engine.run(key, shots, lora, **options)


def pipeline_of(folder, kind=StableDiffusionPipeline, **parts):
    scheduler = TCDScheduler.from_pretrained(folder, subfolder="scheduler", original_inference_steps=TCD_GRID)
    if kind is not StableDiffusionXLPipeline:
        parts["safety_checker"] = None
    pipe = kind.from_pretrained(folder, scheduler=scheduler, local_files_only=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def worst(pictures, others) -> int:
    return max(
        int(np.abs(a.astype(int) - np.asarray(b).astype(int)).max()) for a, b in zip(pictures, others, strict=True)
    )


@pytest.mark.parametrize(("steps", "eta"), [(1, 0.0), (4, 0.0), (8, 0.3)])
def test_images_are_those_of_diffusers(engine, lora_folder, steps, eta):
    pipe = pipeline_of(paths.TEACHER)
    pipe.load_lora_weights(str(lora_folder / "k1.safetensors"))
    theirs = pipe(PROMPTS, num_inference_steps=steps, guidance_scale=0, eta=eta, generator=generators([5, 6, 7])).images
    shots = [Shot(prompt, seed) for prompt, seed in zip(PROMPTS, [5, 6, 7], strict=True)]
    ours = run(engine, key_of(steps, eta=eta), shots).pictures
    # One grey level is a rounding of two orders of summation (LoRA beside the weights there, merged here).
    assert worst(ours, theirs) <= 1
    plain = run(engine, key_of(steps, eta=eta, lora="none"), shots).pictures
    assert worst(ours, plain) > 16, "the LoRA must be seen, or this test sees nothing"


def test_guidance_and_negative_prompts_are_those_of_diffusers(engine, lora_folder):
    pipe = pipeline_of(paths.TEACHER)
    pipe.load_lora_weights(str(lora_folder / "cfg.safetensors"))
    negative = ["a yellow background", "", "blue"]
    theirs = pipe(
        PROMPTS, negative_prompt=negative, num_inference_steps=4, guidance_scale=3.0, generator=generators([1, 2, 3])
    ).images
    shots = [Shot(p, s, n, guidance=3.0) for p, s, n in zip(PROMPTS, [1, 2, 3], negative, strict=True)]
    ours = run(engine, key_of(lora="cfg", guided=True), shots).pictures
    assert worst(ours, theirs) <= 1
    weaker = [Shot(p, s, n, guidance=1.5) for p, s, n in zip(PROMPTS, [1, 2, 3], negative, strict=True)]
    assert worst(ours, run(engine, key_of(lora="cfg", guided=True), weaker).pictures) > 8


def test_a_lora_for_one_timestep_is_sampled_there(tmp_path):
    """The network is given 800 in place of 999, as diffusers' LCMScheduler(timesteps=[800]) gives it."""
    unet = UNet2DConditionModel.from_pretrained(paths.TEACHER / "unet", local_files_only=True)
    file = write_lora(tmp_path, "at800", unet, k=1, seed=4, timestep="800")
    settings = ModelSettings(loras=(str(tmp_path),))
    engine = Engine(settings, read_catalog(settings))
    pipe = pipeline_of(paths.TEACHER)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(str(file))
    theirs = pipe(PROMPTS, timesteps=[800], guidance_scale=0, generator=generators([5, 6, 7])).images
    shots = [Shot(prompt, seed) for prompt, seed in zip(PROMPTS, [5, 6, 7], strict=True)]
    ours = run(engine, key_of(1, lora="at800"), shots).pictures
    assert worst(ours, theirs) <= 1
    pipe = pipeline_of(paths.TEACHER)
    pipe.load_lora_weights(str(file))
    elsewhere = pipe(PROMPTS, num_inference_steps=1, guidance_scale=0, generator=generators([5, 6, 7])).images
    assert worst(ours, elsewhere) > 8, "999 must look different, or this test sees nothing"


@pytest.mark.parametrize(
    ("kind", "options", "steps", "eta"),
    [
        (DDIMScheduler, {"timestep_spacing": "trailing", "clip_sample": False}, 3, 0.0),
        (DDIMScheduler, {"timestep_spacing": "trailing", "clip_sample": False}, 2, 0.5),
        (LCMScheduler, {"original_inference_steps": TCD_GRID}, 4, 1.0),
    ],
)  # fmt: skip
def test_a_lora_is_sampled_by_the_scheduler_of_its_file(tmp_path, kind, options, steps, eta):
    unet = UNet2DConditionModel.from_pretrained(paths.TEACHER / "unet", local_files_only=True)
    file = write_lora(tmp_path, "one", unet, k=4, seed=4, scheduler=kind.__name__)
    settings = ModelSettings(loras=(str(tmp_path),))
    engine = Engine(settings, read_catalog(settings))
    pipe = pipeline_of(paths.TEACHER)
    pipe.scheduler = kind.from_pretrained(paths.TEACHER, subfolder="scheduler", **options)
    pipe.load_lora_weights(str(file))
    theirs = pipe(PROMPTS, num_inference_steps=steps, guidance_scale=0, eta=eta, generator=generators([5, 6, 7])).images
    shots = [Shot(prompt, seed) for prompt, seed in zip(PROMPTS, [5, 6, 7], strict=True)]
    assert worst(run(engine, key_of(steps, lora="one", eta=eta), shots).pictures, theirs) <= 1
    pipe = pipeline_of(paths.TEACHER)
    pipe.load_lora_weights(str(file))
    tcd = pipe(PROMPTS, num_inference_steps=steps, guidance_scale=0, generator=generators([5, 6, 7])).images
    assert worst(map(np.asarray, tcd), theirs) > 4, "TCD must look different, or this test sees nothing"


@pytest.mark.parametrize("steps", [1, 8])
def test_an_image_is_the_same_alone_and_in_any_batch(engine, steps):
    shots = [Shot(PROMPTS[i % 3], 100 + i) for i in range(8)]
    together = run(engine, key_of(steps, eta=0.2), shots).pictures
    alone = [run(engine, key_of(steps, eta=0.2), [shot]).pictures[0] for shot in shots]
    some = run(engine, key_of(steps, eta=0.2), shots[5:2:-1]).pictures
    # Matrix products of another height may sum in another order: at most one grey level. (Measured here: 0.)
    assert worst(together, alone) <= 1
    assert worst(together[5:2:-1], some) <= 1
    assert worst(together[:4], together[4:]) > 8, "different seeds must differ"


def test_a_switch_of_loras_leaves_nothing_behind(engine):
    shots = [Shot(PROMPTS[0], 1)]
    before = {n: p.clone() for n, p in engine.unet.named_parameters()} if engine.switch.current is None else None
    base = run(engine, key_of(lora="none"), shots).pictures
    for _ in range(5):
        first = run(engine, key_of(lora="k1"), shots).pictures
        half = run(engine, key_of(lora="k1", scale=0.5), shots).pictures
        second = run(engine, key_of(lora="k8"), shots).pictures
    assert min(worst(a, b) for a, b in [(first, base), (first, second), (first, half), (half, base)]) > 4
    assert worst(run(engine, key_of(lora="none"), shots).pictures, base) == 0
    if before is not None:
        assert all(torch.equal(p, before[n]) for n, p in engine.unet.named_parameters())
    assert worst(run(engine, key_of(lora="k1"), shots).pictures, first) == 0


def test_a_lora_of_another_base_changes_nothing(engine, tmp_path):
    other = UNet2DConditionModel.from_config({**engine.unet.config, "block_out_channels": (48, 144)})
    path = write_lora(tmp_path, "alien", other, k=1, seed=0)
    alien = type(engine.load_lora("k1"))("k1", _tensors(path), 8.0)
    shots = [Shot(PROMPTS[0], 1)]
    before = run(engine, key_of(), shots).pictures
    with pytest.raises(ValueError, match="same base model"):
        engine.run(key_of(), shots, alien)
    assert worst(run(engine, key_of(), shots).pictures, before) == 0


def _tensors(path):
    from hypersd_ray.models.lora_file import read_lora

    return read_lora(path)[0]


def test_previews_go_from_a_guess_to_the_image(engine):
    seen = {}
    shots = [Shot(PROMPTS[0], 4, show_after=frozenset({1, 2, 3, 4})), Shot(PROMPTS[1], 5)]
    pictures = run(
        engine, key_of(4), shots, on_preview=lambda i, step, pixels: seen.setdefault((i, step), pixels)
    ).pictures
    assert set(seen) == {(0, step) for step in (1, 2, 3, 4)}, "only who asked for previews gets them"
    distance = [np.abs(seen[0, step].astype(int) - pictures[0]).mean() for step in (1, 2, 3, 4)]
    assert distance[0] > distance[2]
    # at eta = 0 the last prediction is the image, but for TCD's last step, which ends at t = 1 in place of 0
    assert distance[3] < 2
    one = {}
    first = run(engine, key_of(1), [shots[0]], on_preview=lambda i, step, pixels: one.setdefault(step, pixels)).pictures
    assert np.abs(seen[0, 1].astype(int) - one[1]).max() <= 1, "the first guess is the same at 1 step and at 4"
    assert np.abs(one[1].astype(int) - first[0]).mean() < 2


def test_it_stops_when_nobody_waits(engine):
    calls = []

    def wanted():
        calls.append(None)
        return len(calls) < 3

    with pytest.raises(Abandoned):
        run(engine, key_of(8), [Shot(PROMPTS[0], 1)], wanted=wanted)
    assert len(calls) == 3


def test_what_does_not_fit_into_memory_is_halved(engine, monkeypatch):
    shots = [Shot(PROMPTS[i % 3], i, show_after=frozenset({1})) for i in range(5)]
    whole = run(engine, key_of(2), shots).pictures
    sizes, real = [], engine._denoise

    def small_device(key, shots, *rest):
        if len(shots) > 2:
            raise torch.OutOfMemoryError("as CUDA says it")
        sizes.append(len(shots))
        return real(key, shots, *rest)

    monkeypatch.setattr(engine, "_denoise", small_device)
    seen = []
    parts = run(engine, key_of(2), shots, on_preview=lambda i, step, pixels: seen.append(i))
    assert sizes == [2, 1, 2]
    assert seen == [0, 1, 2, 3, 4]
    assert worst(parts.pictures, whole) <= 1
    monkeypatch.setattr(engine, "_denoise", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(torch.OutOfMemoryError):
        run(engine, key_of(2), shots[:1])


def test_sdxl_is_that_of_diffusers(sdxl_folder, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(sdxl_folder / "unet", local_files_only=True)
    path = write_lora(tmp_path, "x1", unet, k=1, seed=0, guidance=True, family="sdxl")
    settings = ModelSettings(base=str(sdxl_folder), loras=(str(path),))
    engine = Engine(settings, read_catalog(settings))
    pipe = pipeline_of(sdxl_folder, StableDiffusionXLPipeline)
    pipe.load_lora_weights(str(path))
    for scale, negative in [(1.0, ["", ""]), (4.0, ["a panda", ""])]:
        theirs = [
            pipe(
                f"a drawn {thing}", negative_prompt=text or None, num_inference_steps=2, guidance_scale=scale,
                generator=generators([seed])[0],
            ).images[0]
            for thing, text, seed in zip(["panda", "bicycle"], negative, [1, 2], strict=True)
        ]  # fmt: skip
        shots = [Shot("a drawn panda", 1, negative[0], scale), Shot("a drawn bicycle", 2, negative[1], scale)]
        ours = run(engine, key_of(2, lora="x1", guided=scale > 1, side=64), shots).pictures
        assert worst(ours, theirs) <= 1
    assert worst(ours[:1], ours[1:]) > 8


def test_controlnet_is_that_of_diffusers(control_folder, lora_folder):
    settings = ModelSettings(loras=(str(lora_folder),), controlnets={"edges": str(control_folder)})
    control = ControlNetModel.from_pretrained(control_folder, local_files_only=True)
    engine = Engine(settings, read_catalog(settings))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    pipe = pipeline_of(paths.TEACHER, StableDiffusionControlNetPipeline, controlnet=control)
    pipe.load_lora_weights(str(lora_folder / "cfg.safetensors"))
    for guided in (False, True):
        scale = 3.0 if guided else 1.0
        theirs = pipe(
            PROMPTS[:2], image=[Image.fromarray(p) for p in pictures], num_inference_steps=2, guidance_scale=scale,
            controlnet_conditioning_scale=0.7, generator=generators([1, 2]),
        ).images  # fmt: skip
        shots = [
            Shot(p, s, guidance=scale, control=c, control_scale=0.7)
            for p, s, c in zip(PROMPTS[:2], [1, 2], pictures, strict=True)
        ]
        ours = run(engine, key_of(2, lora="cfg", guided=guided, control="edges"), shots).pictures
        assert worst(ours, theirs) <= 1
        free = run(engine, key_of(2, lora="cfg", guided=guided), shots).pictures
        assert worst(ours, free) > 4, "the ControlNet must be seen"
