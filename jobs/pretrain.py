"""Train the embedded world's teacher: autoencoder, then denoiser and text encoder.

    python jobs/build_emoji.py --node-modules node_modules --train 24000 --out build/emoji
    python jobs/pretrain.py --data build/emoji --out build/pretrain [--device cuda]

    python jobs/pretrain.py --start hypersd_ray/embedded/teacher --style twemoji --out build/twemoji   # another base model

Some four hours on 2 CPU cores, which is how the committed one was made; stopped and started again, it goes on. The result is `OUT/teacher`, committed in
`hypersd_ray/embedded/teacher`, so nobody needs to run this to distil. With --start a base model's UNet is fine-tuned to the pictures of one style, its
other parts stay: a base model on which LoRAs of the first can be tried (paper, Fig. 9). The committed shards hold noto and
twemoji; "fluent", which the teacher never saw, takes shards of jobs/build_emoji.py --styles fluent (--data).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from hypersd_ray.config.base import ConfigError, Strict
from hypersd_ray.config.cli import read_options, run_job
from hypersd_ray.embedded import paths
from hypersd_ray.embedded.pictures import load_pictures
from hypersd_ray.embedded.pretrain_unet import train_unet
from hypersd_ray.embedded.pretrain_vae import train_vae
from hypersd_ray.embedded.text import make_text_encoder, train_tokenizer
from hypersd_ray.models.checkpoint import load_component, read_base


class PretrainConfig(Strict):
    """Sizes of the two trainings."""

    out: Path
    """Folder for the states and the finished pipeline."""
    data: Path = paths.DATA
    """Folder with train-*.tar shards."""
    start: Path | None = None
    """Folder of a base model to fine-tune, in place of training one."""
    style: str = ""
    """With start: the pictures whose captions begin with "a STYLE "; empty is all."""
    start_steps: tuple[int, ...] = (1500,)
    """With start: batches of 64 of each cycle of the learning rate."""
    start_lr: float = 3e-4
    """With start: the greatest learning rate."""
    vae_steps: tuple[int, ...] = (3500, 7000)
    """Batches of each cycle of the learning rate."""
    unet_steps: tuple[int, ...] = (9500, 6000)
    """Likewise, of 64."""
    seed: int = 0
    device: str = "cpu"
    """Where: cpu, cuda, ..."""


def main() -> None:
    """Train both, or what of them is not finished yet."""
    config: PretrainConfig = read_options(PretrainConfig, sys.argv[1:], __doc__ or "")
    if config.style and config.start is None:
        raise ConfigError(f"--style {config.style} needs --start: the base model that is fine-tuned to it")
    config.out.mkdir(parents=True, exist_ok=True)
    if config.start is not None:
        fine_tune(config, config.start)
        return
    images, captions = load_pictures(config.data, "train")
    vae_path = config.out / "vae"
    if vae_path.exists():
        vae = load_component(AutoencoderKL, vae_path)
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


def fine_tune(config: PretrainConfig, start: Path) -> None:
    """The UNet of `start` goes on with the pictures of one style.

    Raises:
        ConfigError: no such base model, or too few such pictures.
    """
    read_base(start)
    if start.resolve() == (config.out / "teacher").resolve():
        raise ConfigError(f"--out {config.out}: its teacher is --start itself; name another folder")
    images, captions = load_pictures(config.data, "train")
    chosen = [
        i for i, caption in enumerate(captions) if caption.startswith(f"a {config.style} " if config.style else "")
    ]
    if len(chosen) < 2:
        raise ConfigError(f"--style {config.style}: {len(chosen)} of {len(captions)} pictures in {config.data} have it")
    print(f"{len(chosen)} of {len(captions)} pictures")
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            start, local_files_only=True, use_safetensors=True, safety_checker=None
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"--start {start} cannot be loaded: {' '.join(str(error).split())}") from None
    train_unet(
        pipeline.vae.eval().requires_grad_(False), pipeline.tokenizer, pipeline.text_encoder, images[chosen],
        [captions[i] for i in chosen], config.out, config.start_steps, lr=config.start_lr, seed=config.seed,
        device=config.device, unet=pipeline.unet,
    )  # fmt: skip


if __name__ == "__main__":
    run_job(main)
