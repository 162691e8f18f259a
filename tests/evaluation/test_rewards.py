"""The judges' table on a tiny pipeline: a LoRA against itself, and one that changes the pictures."""

from __future__ import annotations

import json

import pytest
import torch

from evaluation import rewards
from evaluation.quality import QualityConfig
from tests.actors.conftest import clip_folder, models, pictures

__all__ = ["clip_folder", "models", "pictures"]


@pytest.fixture
def config(folders, prompts_file, make_lora, models, tmp_path) -> rewards.RewardsConfig:
    aesthetic, clip_score, solo = models
    prompts = [line for line in dict.fromkeys(prompts_file.read_text().split("\n")) if line]
    images = [{"id": i, "file_name": f"{i}.png", "width": 8, "height": 8} for i in range(len(prompts))]
    named = [{"id": 1, "image_id": 0, "category_id": 5}, {"id": 2, "image_id": 1, "category_id": 6}]
    categories = [{"id": 5, "name": "a"}, {"id": 6, "name": "b"}]
    for name, content in (
        ("instances", {"images": images, "categories": categories, "annotations": named}),
        ("captions", {"annotations": [{"image_id": i, "caption": p} for i, p in enumerate(prompts)]}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return rewards.RewardsConfig(
        baseline=make_lora(size=0.05), loras=(make_lora(size=0.2),), rewards=(aesthetic, clip_score), detector=solo,
        annotations=tmp_path / "instances.json", captions=tmp_path / "captions.json", resamples=100,
        sampling=QualityConfig(teacher=folders["sd"], prompts_file=prompts_file, steps=(1, 2), batch=4),
    )  # fmt: skip


def test_each_judge_against_the_baseline(config):
    report = rewards.evaluate(config)
    assert [(row.model, row.steps) for row in report.rows] == [
        ("sd-0.05", 1), ("sd-0.05", 2), ("sd-0.2", 1), ("sd-0.2", 2),
    ]  # fmt: skip
    before, after = report.rows[0], report.rows[2]
    assert before.means.keys() == {"aesthetic_v2", "clip_score", "objects", "saturation", "diversity"}
    assert not before.versus and after.versus.keys() == {"aesthetic_v2", "clip_score", "objects"}
    for judge in ("aesthetic_v2", "clip_score"):
        change = after.means[judge].mean - before.means[judge].mean
        assert after.versus[judge].mean == pytest.approx(change, abs=1e-6) and change != 0
    assert "sd-0.2 | 2 |" in rewards.table(report)
    assert report.judges["clip_score"]


def test_named_labels_come_from_the_captions(config):
    prompts = [*rewards.read_prompts(config.sampling), "something else"]
    assert rewards.named_labels(config, prompts)[:2] == [[0], [1]]
    assert rewards.named_labels(config, prompts)[-1] == []


def test_judging_does_not_depend_on_the_batch(config):
    prompts = rewards.read_prompts(config.sampling)
    images = torch.rand(len(prompts), 3, 64, 64, generator=torch.Generator().manual_seed(0))
    one = rewards.Judges(config, prompts)(images)[0]
    sampling = config.sampling.model_copy(update={"batch": 1})
    other = rewards.Judges(config.model_copy(update={"sampling": sampling}), prompts)(images)[0]
    for judge, values in one.items():
        torch.testing.assert_close(values, other[judge], rtol=1e-4, atol=1e-4)
