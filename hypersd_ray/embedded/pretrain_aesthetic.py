"""Train the embedded world's aesthetic predictor: LAION's head (v2) on a CLIP of its own, larger than CLIP score's.

No person has rated these pictures. What "fine" means here is: not spoilt (`spoiling.quality`).
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from hypersd_ray.embedded.pretrain_clip import BAD, Config, contrastive_loss, new_clip, save_clip, tokenize_all
from hypersd_ray.embedded.spoiling import Bank
from hypersd_ray.embedded.text import MAX_TOKENS
from hypersd_ray.embedded.training import flip_some, train
from hypersd_ray.models.rewards.aesthetic import AestheticPredictor, HeadV2
from hypersd_ray.models.rewards.clip import load_tower
from hypersd_ray.models.rewards.protocol import RewardModel

WIDTH = 96
"""Of the joint embedding, which the head reads."""
RATING = 0.1
"""Weight of the head's squared error beside the contrastive loss."""


def large_config(vocabulary: int) -> Config:
    """A ViT of 64 patches: 1.7M parameters."""
    return {
        "embed_dim": WIDTH,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 5, "width": 144, "patch_size": 4, "head_width": 24},
        "text_cfg": {"context_length": MAX_TOKENS, "vocab_size": vocabulary, "width": 96, "heads": 4, "layers": 2},
    }


class _Both(nn.Module):
    """Tower and head learn together: a tower that never had to tell fine from spoilt gives the head little to read."""

    def __init__(self, clip: open_clip.CLIP, marks: Tensor):
        super().__init__()
        self.clip, self.head = clip, HeadV2(WIDTH, (256, 64, 32, 16))
        nn.init.constant_(cast(nn.Linear, self.head.layers[-1]).bias, float(marks.mean()))


def train_aesthetic(
    bank: Bank, teacher: Path, out: Path, folder: Path, path: Path, steps: int, batch: int = 256, seed: int = 0,
    device: torch.device | str = "cpu",
) -> AestheticPredictor:  # fmt: skip
    """Writes the CLIP to `folder` in open_clip's layout and the head to `path` in LAION's."""
    both = _Both(new_clip(large_config, teacher, folder, seed), bank.marks).train()
    tower = load_tower("", folder)
    ids = torch.stack([tokenize_all(tower, bank.captions), tokenize_all(tower, [BAD + c for c in bank.captions])])
    ids = ids.to(device)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(bank.captions), (batch,), generator=generator)
        version = torch.randint(len(bank.marks), (batch,), generator=generator)
        pictures, _ = flip_some(bank.take(version, index), generator)
        marks = bank.marks[version, index]
        told = ids[(marks < 5.5).long().to(device), index.to(device)]
        image = both.clip.encode_image(tower.preprocess(pictures), normalize=True)
        text = both.clip.encode_text(told, normalize=True)
        rating = F.mse_loss(both.head(image)[:, 0], marks.to(device))
        return contrastive_loss(image, text, told, both.clip.logit_scale.exp().clamp(max=100)) + RATING * rating

    train("aesthetic", both, loss, steps, 1e-3, out, seed, weight_decay=0.05, device=device)
    save_clip(both.clip, folder)
    save_file({k: v.contiguous().cpu() for k, v in both.head.state_dict().items()}, path)
    return AestheticPredictor(load_tower("", folder), both.head.cpu()).eval().requires_grad_(False)


@torch.no_grad()
def rating_error(model: RewardModel, bank: Bank) -> dict[str, float]:
    """On pictures that it never saw: correlation and root mean squared error of said and true marks."""
    pictures, captions = bank.pictures.flatten(0, 1).cpu(), bank.captions * len(bank.marks)
    said = torch.cat([
        model(pictures[i : i + 256].float() / 255, captions[i : i + 256]) for i in range(0, len(pictures), 256)
    ])  # fmt: skip
    marks = bank.marks.flatten()
    correlation = torch.corrcoef(torch.stack([said, marks]))[0, 1].item()
    return {"correlation": correlation, "rmse": (said - marks).square().mean().sqrt().item()}
