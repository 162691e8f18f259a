"""Train the embedded world's autoencoder: an `AutoencoderKL` that halves a 32-pixel picture twice (f4, 8x8x4 latents)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from hypersd_ray.embedded.pictures import to_unit
from hypersd_ray.embedded.training import train


def make_vae() -> AutoencoderKL:
    """Stable Diffusion's autoencoder, narrower: 0.77M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=32,
    )


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences between neighbouring pixels, down and across."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def vae_loss(vae: AutoencoderKL, x: torch.Tensor, generator: torch.Generator, kl_weight: float) -> torch.Tensor:
    """L1 on pixels and on their differences (for sharp edges) and a light pull of the latents to a unit Gaussian."""
    posterior = vae.encode(x).latent_dist
    decoded = vae.decode(posterior.sample(generator)).sample
    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(decoded), edges(x), strict=True))
    return F.l1_loss(decoded, x) + edge + kl_weight * posterior.kl().mean()


def train_vae(
    images: torch.Tensor,
    out: Path,
    steps: Sequence[int],
    batch: int = 32,
    lr: float = 2e-3,
    kl_weight: float = 1e-5,
    seed: int = 0,
    device: str = "cpu",
) -> AutoencoderKL:
    """Train for cycles of `steps` batches of `images` (N, 3, H, W) uint8, resuming from `out/vae_state.pt`; saves to `out/vae`.

    The scaling factor is set so that latents have unit variance, as Stable Diffusion's is.
    """
    torch.manual_seed(seed)
    vae = make_vae().to(device)

    def loss(generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(len(images), (batch,), generator=generator)
        x = to_unit(images[index].to(device))
        if torch.rand((), generator=generator) < 0.5:
            x = x.flip(-1)
        return vae_loss(vae, x, generator, kl_weight)

    train("vae", vae, loss, steps, lr, out, seed, weight_decay=1e-4)
    vae.eval()
    with torch.no_grad():
        held = to_unit(images[:512].to(device))
        latents = vae.encode(held).latent_dist.mode()
        error = F.mse_loss(vae.decode(latents).sample, held).item()
    vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))
    print(f"vae mse {error:.5f} (range -1..1), scaling factor {vae.config.scaling_factor}")
    vae.save_pretrained(out / "vae")
    return vae
