"""Latent discriminator on the teacher's own features (paper Sec. 3.1's adversarial loss, after SDXL-Lightning).

The frozen base UNet's encoder and middle block see the noised latent, its time and its text; light heads judge each
level's features. Only the heads are trained.

Shapes: x_t (B, C, h, w); t (B,); features: one (B, c_i, h_i, w_i) per level; logits: one (B, 1, h_i, w_i) per level.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.roles import TEACHER, Roles


def unet_encoder(unet: UNet2DConditionModel, x_t: Tensor, index: Tensor, cond: Conditioning) -> list[Tensor]:
    """Features after each down block and the middle block; `index` (B,) is the network's own time."""
    added = cond.added_kwargs()
    emb = unet.time_embedding(unet.get_time_embed(sample=x_t, timestep=index))
    augmented = unet.get_aug_embed(emb=emb, encoder_hidden_states=cond.prompt_embeds, added_cond_kwargs=added)
    emb = emb if augmented is None else emb + augmented
    x, features = unet.conv_in(x_t), []
    for block in unet.down_blocks:
        if getattr(block, "has_cross_attention", False):
            x, _ = block(hidden_states=x, temb=emb, encoder_hidden_states=cond.prompt_embeds)
        else:
            x, _ = block(hidden_states=x, temb=emb)
        features.append(x)
    features.append(unet.mid_block(x, emb, encoder_hidden_states=cond.prompt_embeds))
    return features


class Head(nn.Module):
    """Features of one level to a map of logits."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.GroupNorm(32, hidden),
            nn.SiLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.GroupNorm(32, hidden),
            nn.SiLU(),
            nn.Conv2d(hidden, 1, 1),
        )

    def forward(self, feature: Tensor) -> Tensor:
        return self.layers(feature)


class LatentDiscriminator(nn.Module):
    """Heads over the base UNet's features."""

    def __init__(self, unet_config: dict, seed: int, conditional: bool = False):
        """`seed` decides the heads' first weights, whatever the global random state is. `conditional` heads see, beside
        the features of what they judge, those of what it was made from."""
        super().__init__()
        self.conditional, views = conditional, 2 if conditional else 1
        widths = list(unet_config["block_out_channels"])
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: it would reseed the GPU's generators too, which fork_rng does not restore here.
            torch.random.default_generator.manual_seed(seed)
            # At most 256 wide: the heads are meant to be light beside the features.
            self.heads = nn.ModuleList(Head(views * c, min(256, max(64, c // 32 * 32))) for c in [*widths, widths[-1]])

    def logits(self, features: list[Tensor], origin: list[Tensor] | None = None) -> list[Tensor]:
        """One map per level, float32. `origin`: the features that conditional heads see too."""
        assert (origin is not None) == self.conditional
        seen = features if origin is None else [torch.cat(pair, 1) for pair in zip(features, origin, strict=True)]
        return [head(feature.float()) for head, feature in zip(self.heads, seen, strict=True)]


def features(roles: Roles, x_t: Tensor, t: Tensor, cond: Conditioning) -> list[Tensor]:
    """The base's features of x_t (gradient flows to x_t); t in our time, 1..T."""
    with roles.playing(TEACHER) as unet:
        return unet_encoder(unet, x_t.to(roles.dtype), t - 1, cond.cast(roles.dtype))
