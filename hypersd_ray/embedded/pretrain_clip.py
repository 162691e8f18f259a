"""Train the embedded world's CLIP (open_clip's class) on its captions.

Shapes: pictures (B, 3, H, W); embeddings (B, D) of norm 1; ids (B, L).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from hypersd_ray.embedded.spoiling import Spoiler, quality
from hypersd_ray.embedded.text import MAX_TOKENS, load_tokenizer
from hypersd_ray.embedded.training import flip_some, train
from hypersd_ray.models.rewards.clip import CONFIG, WEIGHTS, ClipTower, load_tower

Config = dict[str, Any]


def clip_config(vocabulary: int) -> Config:
    """The judge of CLIP score: a ViT of 16 patches and a two-layer text encoder, 1.2M parameters."""
    return {
        "embed_dim": 96,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 4, "width": 128, "patch_size": 8, "head_width": 32},
        "text_cfg": {"context_length": MAX_TOKENS, "vocab_size": vocabulary, "width": 96, "heads": 4, "layers": 2},
    }


def new_clip(config: Callable[[int], Config], teacher: Path, folder: Path, seed: int) -> open_clip.CLIP:
    """Untrained, for the vocabulary of the teacher's tokenizer, which `folder` gets, the sizes and the weights too."""
    torch.manual_seed(seed)
    sizes = config(len(load_tokenizer(teacher / "tokenizer")))
    clip = open_clip.CLIP(**sizes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"model_cfg": sizes}, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((teacher / "tokenizer" / name).read_bytes())
    save_clip(clip, folder)
    return clip


def save_clip(clip: open_clip.CLIP, folder: Path) -> None:
    """Its weights, where `new_clip` wrote the rest, in half precision: a repository is small."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in clip.eval().state_dict().items()}
    save_file({k: v.contiguous().cpu() for k, v in state.items()}, folder / WEIGHTS)


def tokenize_all(tower: ClipTower, captions: list[str]) -> Tensor:
    """(N, L)."""
    return torch.cat([tower.tokenize(captions[i : i + 1024]) for i in range(0, len(captions), 1024)])


def contrastive_loss(image: Tensor, text: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric cross entropy at `scale`; equal captions in a batch count as right for each other."""
    logits = scale * image @ text.T
    same = (ids[:, None] == ids[None]).all(-1).float()
    wanted = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2


BAD = "bad "
"""What the caption of a spoilt picture begins with. A CLIP of the web has met bad pictures, and words for them: only so can
a head without activations read from its embedding how fine a picture is."""


@torch.no_grad()
def with_spoilt(
    images: Tensor, captions: list[str], teacher: Path, count: int, seed: int = 0
) -> tuple[Tensor, list[str]]:
    """The pictures and their captions, and the first `count` spoilt: those of less than half quality are called bad."""
    generator, spoil = torch.Generator().manual_seed(seed), Spoiler(teacher)
    parts, told = [images], list(captions)
    for start in range(0, min(count, len(images)), 256):
        end = min(start + 256, count, len(images))
        clean = images[start:end].float() / 255
        spoilt = spoil(clean, captions[start:end], generator)
        parts.append((spoilt * 255).round().to(torch.uint8))
        marks = quality(spoilt, clean).tolist()
        told += [(BAD if m < 5.5 else "") + c for m, c in zip(marks, captions[start:end], strict=True)]
    return torch.cat(parts), told


def train_clip(
    images: Tensor, captions: list[str], teacher: Path, out: Path, folder: Path, steps: int | Sequence[int],
    batch: int = 128, seed: int = 0, spoilt: int = 0,
) -> ClipTower:  # fmt: skip
    """Train on uint8 pictures (N, 3, 32, 32) with the teacher's tokenizer; writes `folder` in open_clip's layout.

    The last `spoilt` pictures are the first ones again, spoilt (`with_spoilt`): a quarter of a batch is both of some, side
    by side, or nothing would be gained by telling them apart.
    """
    clip = new_clip(clip_config, teacher, folder, seed)
    tower = load_tower("", folder)
    ids = tokenize_all(tower, captions)

    def loss(generator: torch.Generator) -> Tensor:
        twins = batch // 8 if spoilt else 0
        index = torch.randint(len(images), (batch - 2 * twins,), generator=generator)
        sound = torch.randint(max(spoilt, 1), (twins,), generator=generator)
        index = torch.cat([index, sound, sound + len(images) - spoilt])
        pictures, _ = flip_some(images[index].float() / 255, generator)
        image = clip.encode_image(tower.preprocess(pictures), normalize=True)
        text = clip.encode_text(ids[index], normalize=True)
        return contrastive_loss(image, text, ids[index], clip.logit_scale.exp().clamp(max=100))

    train("clip", clip, loss, steps, 1e-3, out, seed, weight_decay=0.05)
    save_clip(clip, folder)
    return load_tower("", folder)


@torch.no_grad()
def retrieval(tower: ClipTower, images: Tensor, captions: list[str]) -> dict[str, float]:
    """Held-out pictures: share whose own caption is the nearest, and 100 * cosine of right and of wrong pairs."""
    pictures = torch.cat([tower.image_embedding(part.float() / 255) for part in images.split(256)])
    distinct = list(dict.fromkeys(captions))
    texts = tower.text_embedding(distinct)
    right = torch.tensor([distinct.index(c) for c in captions])
    cosine = 100 * pictures @ texts.T
    own = cosine.gather(1, right[:, None])[:, 0]
    others = (cosine.sum(1) - own) / (len(distinct) - 1)
    hit = (cosine.argmax(1) == right).float().mean()
    return {"captions": len(distinct), "r_at_1": hit.item(), "right": own.mean().item(), "wrong": others.mean().item()}
