"""From a `RewardConfig` to the model it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from hypersd_ray.config.rewards import RewardConfig
from hypersd_ray.models.rewards.aesthetic import AestheticPredictor, load_head
from hypersd_ray.models.rewards.clip import CLIPScore, HPSv2, load_pick_score, load_tower
from hypersd_ray.models.rewards.image_reward import load_image_reward
from hypersd_ray.models.rewards.image_reward_package import load_image_reward_package
from hypersd_ray.models.rewards.protocol import RewardModel

ARCHITECTURES = {
    "aesthetic_v1": "ViT-L-14-quickgelu",
    "aesthetic_v2": "ViT-L-14-quickgelu",
    "clip_score": "ViT-B-32-quickgelu",
    "hps_v21": "ViT-H-14",
}
"""The published CLIPs; OpenAI's weights want the quickgelu names."""


def _aesthetic(config: RewardConfig) -> RewardModel:
    if not config.tower:
        raise ValueError(f"reward {config.name}: set `tower` to CLIP ViT-L/14's weights or a folder")
    tower = load_tower(config.architecture or ARCHITECTURES[config.name], config.tower)
    width = tower.clip.visual.output_dim
    return AestheticPredictor(tower, load_head(config.checkpoint, int(config.name[-1]), width))


LOADERS: Mapping[str, Callable[[RewardConfig], RewardModel]] = {
    "aesthetic_v1": _aesthetic,
    "aesthetic_v2": _aesthetic,
    "image_reward": lambda c: load_image_reward(c.checkpoint, c.tokenizer or None),
    "image_reward_package": lambda c: load_image_reward_package(c.checkpoint, c.tokenizer or None),
    "clip_score": lambda c: CLIPScore(load_tower(c.architecture or ARCHITECTURES["clip_score"], c.checkpoint)),
    "hps_v21": lambda c: HPSv2(load_tower(c.architecture or ARCHITECTURES["hps_v21"], c.checkpoint, fit="pad")),
    "pick_score": lambda c: load_pick_score(c.checkpoint),
}


def load_reward(
    config: RewardConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> RewardModel:
    """The model in evaluation mode, frozen; heads stay float32.

    Raises:
        ValueError: a file is missing or does not fit; one line with its name.
    """
    model = LOADERS[config.name](config).eval().requires_grad_(False)
    if dtype != torch.float32:
        for name, child in model.named_children():
            if name != "head":
                child.to(dtype)
    return model.to(device)
