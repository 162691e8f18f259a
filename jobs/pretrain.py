"""Train the embedded world's teacher: autoencoder, then denoiser and text encoder.

    python jobs/build_emoji.py --node-modules node_modules --train 24000 --out build/emoji
    python jobs/pretrain.py --data build/emoji --out build/pretrain [--device cuda]

Some four hours on 2 CPU cores, which is how the committed one was made; stopped and started again, it goes on. The result is `OUT/teacher`, committed in
`hypersd_ray/embedded/teacher`, so nobody needs to run this to distil.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

import torch
import tyro
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from hypersd_ray.config.cli import run_job
from hypersd_ray.embedded.pictures import load_pictures
from hypersd_ray.embedded.pretrain_unet import train_unet
from hypersd_ray.embedded.pretrain_vae import train_vae
from hypersd_ray.embedded.text import make_text_encoder, train_tokenizer


@dataclass(frozen=True)
class PretrainConfig:
    """Sizes of the two trainings."""

    data: Path
    """Folder with train-*.tar shards."""
    out: Path
    """Folder for the states and the finished pipeline."""
    vae_steps: tuple[int, ...] = (3500, 7000)
    """Batches of each cycle of the learning rate."""
    unet_steps: tuple[int, ...] = (9500, 6000)
    """Likewise, of 64."""
    seed: int = 0
    device: str = "cpu"
    """Where: cpu, cuda, ..."""


def main() -> None:
    """Train both, or what of them is not finished yet."""
    config = tyro.cli(PretrainConfig, description=__doc__)
    config.out.mkdir(parents=True, exist_ok=True)
    images, captions = load_pictures(config.data, "train")
    vae_path = config.out / "vae"
    if vae_path.exists():
        vae = AutoencoderKL.from_pretrained(vae_path)
    else:
        vae = train_vae(images, config.out, config.vae_steps, seed=config.seed, device=config.device)
    tokenizer_path = config.out / "tokenizer"
    if not tokenizer_path.exists():  # kept: merges that are equally frequent may come in another order another time
        train_tokenizer(captions).save_pretrained(tokenizer_path)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_path)
    torch.manual_seed(config.seed)
    text = make_text_encoder(tokenizer)
    train_unet(
        vae.eval().requires_grad_(False),
        tokenizer,
        text,
        images,
        captions,
        config.out,
        config.unet_steps,
        seed=config.seed,
        device=config.device,
    )


if __name__ == "__main__":
    run_job(main)
