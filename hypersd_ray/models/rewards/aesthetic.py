"""LAION's aesthetic predictors: a head without activations on CLIP ViT-L/14's normalised image embedding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from hypersd_ray.models.rewards.clip import ClipTower
from hypersd_ray.models.rewards.protocol import RewardModel, check_images
from hypersd_ray.models.rewards.weights import load_weights, read_tensors


def head_v1(width: int = 768) -> nn.Module:
    """`sa_0_4_vit_l_14_linear.pth`: one linear layer, keys `weight`, `bias`."""
    return nn.Linear(width, 1)


class HeadV2(nn.Module):
    """`sac+logos+ava1-l14-linearMSE.pth`: five linear layers with dropout between, keys `layers.{0,2,4,6,7}.*`.

    ImageReward's head is the same.
    """

    def __init__(self, width: int = 768, hidden: tuple[int, int, int, int] = (1024, 128, 64, 16)):
        super().__init__()
        a, b, c, d = hidden
        self.layers = nn.Sequential(
            nn.Linear(width, a), nn.Dropout(0.2), nn.Linear(a, b), nn.Dropout(0.2), nn.Linear(b, c), nn.Dropout(0.1),
            nn.Linear(c, d), nn.Linear(d, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) -> (B, 1)."""
        return self.layers(x)


class AestheticPredictor(RewardModel):
    """About 1 (poor) to 10 (fine); the prompt is not looked at."""

    convention = "LAION aesthetic predictor, bicubic to the short side, centre crop"

    def __init__(self, tower: ClipTower, head: nn.Module):
        super().__init__()
        self.tower, self.head = tower, head

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check_images(images, prompts)
        return self.head(self.tower.image_embedding(images)).squeeze(-1).float()


def load_head(path: str | Path, version: int, width: int) -> nn.Module:
    """The head of version 1 or 2 from its published file (or the embedded world's, whose widths are its own).

    Raises:
        ValueError: the file does not fit, in one line.
    """
    tensors = read_tensors(path)
    head: nn.Module = head_v1(width)
    if version == 2:
        a, b, c, d = (
            len(tensors[f"layers.{i}.bias"]) if f"layers.{i}.bias" in tensors else default
            for i, default in ((0, 1024), (2, 128), (4, 64), (6, 16))
        )
        head = HeadV2(width, (a, b, c, d))
    load_weights(head, tensors, path)
    return head.eval().requires_grad_(False)
