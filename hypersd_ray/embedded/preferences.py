"""Preference pairs of the embedded world, and the small ImageReward that they teach.

No person has judged these pictures. Of two pictures for a caption the "preferred" is the real one, or the one less
spoilt; a quarter of the rejected ones are sound pictures of another caption.
"""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from hypersd_ray.embedded.pretrain_clip import Spoiler, quality
from hypersd_ray.embedded.text import load_tokenizer
from hypersd_ray.models.rewards.aesthetic import HeadV2
from hypersd_ray.models.rewards.image_reward import ImageReward, save_image_reward, text_config, vision_config


def _png(image: Tensor) -> bytes:
    data = io.BytesIO()
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


@torch.no_grad()
def write_pairs(images: Tensor, captions: list[str], teacher: Path, path: Path, seed: int = 0) -> int:
    """A parquet file (prompt, chosen, rejected) of uint8 pictures (N, 3, H, W); returns how many pairs."""
    generator, spoil = torch.Generator().manual_seed(seed), Spoiler(teacher)
    rows: dict[str, list] = {"prompt": [], "chosen": [], "rejected": []}
    for start in range(0, len(images), 256):
        clean, told = images[start : start + 256].float() / 255, captions[start : start + 256]
        both = [spoil(clean, told, generator) for _ in range(2)]
        marks = [quality(spoilt, clean) for spoilt in both]
        other = torch.randperm(len(clean), generator=generator)
        swap = torch.rand(len(clean), generator=generator) < 0.25
        for i, caption in enumerate(told):
            better, worse = (both[0][i], both[1][i]) if marks[0][i] > marks[1][i] else (both[1][i], both[0][i])
            if swap[i] and captions[start + int(other[i])] != caption:
                worse = clean[other[i]]
            elif abs(float(marks[0][i] - marks[1][i])) < 0.5:
                continue  # nobody could say
            rows["prompt"].append(caption)
            rows["chosen"].append(_png(better))
            rows["rejected"].append(_png(worse))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), path)
    return len(rows["prompt"])


def write_start(teacher: Path, folder: Path, seed: int = 0) -> ImageReward:
    """A small untrained ImageReward (1.1M parameters) with the teacher's tokenizer, in `folder`."""
    tokenizer = load_tokenizer(teacher / "tokenizer")
    torch.manual_seed(seed)
    model = ImageReward(
        vision_config(hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                      image_size=32, patch_size=8),
        text_config(vocab_size=len(tokenizer), hidden_size=96, encoder_hidden_size=96, intermediate_size=384,
                    num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32, bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id, sep_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id),
        tokenizer, mean=0.0, std=1.0,
    )  # fmt: skip
    # The authors' start of the head, 1 / width in five layers, is for features that are trained already: from scratch
    # next to no gradient would get through it.
    model.head = HeadV2(96)
    save_image_reward(model, folder)
    return model
