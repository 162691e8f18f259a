"""Small checkpoints on disk: an aesthetic predictor on a small CLIP, and a small SOLO."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hypersd_ray.config.rewards import PerceptionConfig, RewardConfig
from hypersd_ray.models.perception.solo import SOLOConfig, SOLONetwork
from hypersd_ray.models.perception.solo_model import SOLO, save_solo
from hypersd_ray.models.rewards.aesthetic import HeadV2
from tests.rewards.conftest import clip_folder, pictures

__all__ = ["clip_folder", "pictures"]


@pytest.fixture(scope="session")
def models(clip_folder: Path, tmp_path_factory) -> list[RewardConfig | PerceptionConfig]:
    """aesthetic_v2, clip_score and solo, random weights."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    torch.save(HeadV2(24, (32, 16, 8, 4)).state_dict(), folder / "head.pth")
    config = SOLOConfig(
        num_classes=3, blocks=(1, 1, 1, 1), width=8, fpn_channels=16, head_channels=16, stacked_convs=2, norm_groups=4,
        num_grids=(8, 6, 4, 3, 2), scale_ranges=((1, 64),) * 5, short_side=64,
    )  # fmt: skip
    save_solo(SOLO(SOLONetwork(config)), folder / "solo")
    return [
        RewardConfig(name="aesthetic_v2", checkpoint=str(folder / "head.pth"), tower=str(clip_folder)),
        RewardConfig(name="clip_score", checkpoint=str(clip_folder)),
        PerceptionConfig(name="solo", checkpoint=str(folder / "solo")),
    ]
