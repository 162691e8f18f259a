"""What people like as a loss of generated latents: decoded, scored, Eq. 15.

Shapes: x (B, C, h, w) latents; images (B, 3, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers import AutoencoderKL
from torch import Tensor

from hypersd_ray.config.rewards import RewardConfig
from hypersd_ray.losses.feedback import loss_aes
from hypersd_ray.models.scoring import RewardClient, Scores
from hypersd_ray.training.pictures import decode, saturation


def aes_of(
    client: RewardClient, rewards: Sequence[RewardConfig], images: Tensor, prompts: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_aes of Eq. 15, with gradient in `images`, and each reward's mean."""
    scores = client(images, {r.name: list(prompts) for r in rewards})
    ordered: list[Scores] = [scores[r.name] for r in rewards]
    loss = loss_aes(
        [s.values for s in ordered], [r.alpha for r in rewards], [s.valid for s in ordered], [r.weight for r in rewards]
    )
    return loss, {f"reward/{r.name}": mean(s) for r, s in zip(rewards, ordered, strict=True)}


def mean(scores: Scores) -> Tensor:
    """Of the valid ones."""
    valid = scores.valid
    return (scores.values.detach() * valid).sum() / valid.sum().clamp(min=1)


@dataclass(frozen=True)
class Rewarded:
    """The rewards of a run that trains by other losses too.

    Attributes:
        rewards: r_d of Eq. 15.
        vae: the base's autoencoder, float32, frozen.
        client: scores, from actors or from this process.
        decode_batch: latents decoded at once.
    """

    rewards: Sequence[RewardConfig]
    vae: AutoencoderKL
    client: RewardClient
    decode_batch: int

    def __call__(self, x: Tensor, captions: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """L_aes of the pictures of x, with gradient in x, and what there is to log."""
        images = decode(self.vae, x, self.decode_batch)
        loss, means = aes_of(self.client, self.rewards, images, captions)
        return loss, {"aes": loss, "saturation": saturation(images.detach())} | means
