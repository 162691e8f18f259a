"""Guidance and negative prompts on LoRAs: the texts that are compared, and the sampler's ends."""

from __future__ import annotations

import pytest
import torch

from evaluation.guidance import GuidanceConfig, Guided, evaluate, table, two_objects
from evaluation.quality import QualityConfig
from hypersd_ray.config.base import ConfigError
from hypersd_ray.embedded import paths

LORA = paths.LORAS / "tscd-k8.safetensors"
PROMPTS = ["a noto pear on a red background", "a noto fox and a noto red apple on a sky and white background"]


def test_prompts_of_two_objects_are_taken_apart():
    assert two_objects(PROMPTS) == [
        (
            PROMPTS[1], "a noto red apple", "a noto fox on a sky and white background",
            "a noto red apple on a sky and white background",
        )
    ]  # fmt: skip


def test_scale_1_is_no_guidance_and_an_empty_negative_is_none():
    subject = Guided(QualityConfig(), PROMPTS)
    subject.load_lora(LORA)
    latents = subject.student(2, "tcd")
    torch.testing.assert_close(subject.pictures(PROMPTS, 2, 1.0), subject.encoders.decode(latents) / 255.0)
    plain = subject.pictures(PROMPTS, 2, 3.0)
    torch.testing.assert_close(subject.pictures(PROMPTS, 2, 3.0, ["", ""]), plain)
    other = subject.pictures(PROMPTS, 2, 3.0, ["", "a noto red apple"])
    torch.testing.assert_close(other[0], plain[0])
    assert (other[1] - plain[1]).abs().max() > 0.05


def test_a_report_has_every_row():
    report = evaluate(GuidanceConfig(loras=(LORA,), steps=1, scales=(1.0, 2.0), prompts=16))
    assert [(row.scale, row.change is None) for row in report.scaled] == [(1.0, True), (2.0, False)]
    assert report.negated[0].prompts >= 2 and "| tscd-k8 | 2 |" in table(report)


def test_scales_below_one_are_refused():
    with pytest.raises(ConfigError, match=r"--scales .* none below 1"):
        evaluate(GuidanceConfig(loras=(LORA,), scales=(0.5,)))
