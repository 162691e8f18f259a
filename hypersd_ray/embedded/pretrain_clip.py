"""Train the embedded world's CLIP (open_clip's class) on its captions, and an aesthetic head on that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from hypersd_ray.diffusion.parameterization import to_prediction
from hypersd_ray.diffusion.schedule import add_noise
from hypersd_ray.embedded.text import MAX_TOKENS, load_tokenizer
from hypersd_ray.embedded.training import flip_some, train
from hypersd_ray.models.checkpoint import load_component, read_base
from hypersd_ray.models.rewards.aesthetic import HeadV2
from hypersd_ray.models.rewards.clip import CONFIG, WEIGHTS, ClipTower, load_tower

WIDTH = 96
"""Of the joint embedding."""


def clip_config(vocabulary: int) -> dict[str, Any]:
    """A ViT of 16 patches and a three-layer text encoder: 1.2M parameters."""
    return {
        "embed_dim": WIDTH,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 4, "width": 128, "patch_size": 8, "head_width": 32},
        "text_cfg": {"context_length": MAX_TOKENS, "vocab_size": vocabulary, "width": 96, "heads": 4, "layers": 2},
    }


def contrastive_loss(clip: open_clip.CLIP, images: Tensor, ids: Tensor) -> Tensor:
    """CLIP's symmetric cross entropy; equal captions in a batch count as right for each other."""
    image, text = clip.encode_image(images, normalize=True), clip.encode_text(ids, normalize=True)
    logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T
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
    torch.manual_seed(seed)
    config = clip_config(len(load_tokenizer(teacher / "tokenizer")))
    clip = open_clip.CLIP(**config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"model_cfg": config}, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((teacher / "tokenizer" / name).read_bytes())
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, folder / WEIGHTS)
    tower = load_tower("", folder)
    ids = torch.cat([tower.tokenize(captions[i : i + 1024]) for i in range(0, len(captions), 1024)])

    def loss(generator: torch.Generator) -> Tensor:
        twins = batch // 8 if spoilt else 0
        index = torch.randint(len(images), (batch - 2 * twins,), generator=generator)
        sound = torch.randint(max(spoilt, 1), (twins,), generator=generator)
        index = torch.cat([index, sound, sound + len(images) - spoilt])
        pictures, _ = flip_some(images[index].float() / 255, generator)
        return contrastive_loss(clip, tower.preprocess(pictures), ids[index])

    train("clip", clip, loss, steps, 1e-3, out, seed, weight_decay=0.05)
    save_file({k: v.contiguous() for k, v in clip.eval().state_dict().items()}, folder / WEIGHTS)
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


class Spoiler:
    """Spoils pictures as few-step samples are: by the teacher's own early predictions and by plain damage."""

    def __init__(self, teacher: Path):
        self.info = read_base(teacher)
        self.vae = load_component(AutoencoderKL, teacher / "vae")
        self.unet = load_component(UNet2DConditionModel, teacher / "unet")
        self.text = load_component(CLIPTextModel, teacher / "text_encoder")
        self.tokenizer = load_tokenizer(teacher / "tokenizer")

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: list[str], generator: torch.Generator) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1], each spoilt in one way, a seventh left as they are.

        Two sevenths: the teacher's x0 from a random time (the later, the more blurred); the others: through the
        autoencoder only, blurred, noisy, or with wrong colours.
        """
        predicted, through = self._by_teacher(images, captions, generator)
        amount = torch.rand(len(images), 1, 1, 1, generator=generator)
        blurred = F.interpolate(F.avg_pool2d(images, 4), scale_factor=4.0, mode="bilinear")
        grey = images.mean(1, keepdim=True)
        colour = torch.where(torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5, -1.0, 2.0)
        kinds = torch.stack([
            predicted, predicted, through, images,
            images + amount * (blurred - images),
            images + 0.4 * amount * torch.randn(images.shape, generator=generator),
            grey + (images - grey) * (1 + colour * amount),
        ]).clamp(0, 1)  # fmt: skip
        kind = torch.randint(len(kinds), (len(images),), generator=generator)
        return kinds[kind, torch.arange(len(images))]

    def _by_teacher(self, images: Tensor, captions: list[str], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The teacher's x0 from a random time, and what the autoencoder makes of the pictures."""
        scale, schedule = self.vae.config.scaling_factor, self.info.schedule
        x0 = self.vae.encode(images * 2 - 1).latent_dist.mode() * scale
        t = torch.randint(1, schedule.T + 1, (len(x0),), generator=generator)
        x_t = add_noise(schedule, x0, torch.randn(x0.shape, generator=generator), t)
        told = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        output = self.unet(x_t, t - 1, self.text(told).last_hidden_state).sample
        predicted = to_prediction(output, x_t, *schedule.at(t), self.info.parameterization).x0
        pictures = [((self.vae.decode(z / scale).sample + 1) / 2).clamp(0, 1) for z in (predicted, x0)]
        return pictures[0], pictures[1]


def quality(spoilt: Tensor, images: Tensor) -> Tensor:
    """What the head is to say, (N,): 10 for the picture itself, less 9 for a root mean squared error of 1/4."""
    error = (spoilt - images).square().mean((1, 2, 3)).sqrt()
    return 10 - 9 * (error / 0.25).clamp(max=1)


@torch.no_grad()
def _rated(tower: ClipTower, images: Tensor, captions: list[str], teacher: Path, seed: int) -> tuple[Tensor, Tensor]:
    """Embeddings (N, D) of spoilt pictures, and their quality (N,)."""
    generator, spoil = torch.Generator().manual_seed(seed), Spoiler(teacher)
    embeddings, scores = [], []
    for start in range(0, len(images), 256):
        clean = images[start : start + 256].float() / 255
        spoilt = spoil(clean, captions[start : start + 256], generator)
        embeddings.append(tower.image_embedding(spoilt))
        scores.append(quality(spoilt, clean))
    return torch.cat(embeddings), torch.cat(scores)


def train_aesthetic(
    tower: ClipTower, images: Tensor, captions: list[str], teacher: Path, out: Path, path: Path, steps: int,
    seed: int = 0,
) -> HeadV2:  # fmt: skip
    """LAION's head (v2) on the frozen tower, taught how spoilt a picture is; writes `path`.

    No person has rated these pictures. What "fine" means here is: not spoilt.
    """
    embeddings, scores = _rated(tower, images, captions, teacher, seed)
    torch.manual_seed(seed)
    head = HeadV2(WIDTH)
    nn.init.constant_(cast(nn.Linear, head.layers[-1]).bias, float(scores.mean()))

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(scores), (256,), generator=generator)
        return F.mse_loss(head(embeddings[index])[:, 0], scores[index])

    train("aesthetic", head.train(), loss, steps, 1e-3, out, seed)
    save_file({k: v.contiguous() for k, v in head.state_dict().items()}, path)
    return head.eval()


@torch.no_grad()
def rating_error(
    tower: ClipTower, head: HeadV2, images: Tensor, captions: list[str], teacher: Path, seed: int = 1
) -> dict[str, float]:
    """On held-out pictures: correlation and root mean squared error of said and true quality."""
    embeddings, scores = _rated(tower, images, captions, teacher, seed)
    said = head(embeddings)[:, 0]
    correlation = torch.corrcoef(torch.stack([said, scores]))[0, 1].item()
    return {"correlation": correlation, "rmse": (said - scores).square().mean().sqrt().item()}
