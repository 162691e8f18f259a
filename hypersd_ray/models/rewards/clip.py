"""Scores by a CLIP's two towers: CLIP score, HPS v2.1 (open_clip) and PickScore (transformers' layout)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from hypersd_ray.models.checkpoint import load_component
from hypersd_ray.models.rewards.preprocess import Fit, Preprocess
from hypersd_ray.models.rewards.protocol import RewardModel, check_images
from hypersd_ray.models.rewards.weights import load_weights, read_tensors

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
"""Files of a folder in open_clip's own layout."""
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's files keep among the weights."""


class ClipTower(nn.Module):
    """An open_clip model with its tokenizer: normalised embeddings of images and prompts, (B, D) float32."""

    def __init__(self, clip: open_clip.CLIP, tokenize, fit: Fit = "crop"):
        super().__init__()
        self.clip, self.tokenize = clip, tokenize
        size = clip.visual.image_size
        self.preprocess = Preprocess(size[0] if isinstance(size, tuple) else size, fit)

    def image_embedding(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D) of norm 1."""
        dtype = next(self.clip.visual.parameters()).dtype
        return F.normalize(self.clip.encode_image(self.preprocess(images.float()).to(dtype)).float(), dim=-1)

    def text_embedding(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> (B, D) of norm 1; a prompt that is too long is cut."""
        ids = self.tokenize(list(prompts)).to(next(self.clip.parameters()).device)
        return F.normalize(self.clip.encode_text(ids).float(), dim=-1)


def load_tower(architecture: str, checkpoint: str | Path, fit: Fit = "crop") -> ClipTower:
    """A tower from a checkpoint file in open_clip's layout, or from a folder with `open_clip_config.json`.

    Args:
        architecture: open_clip's model name, e.g. "ViT-B-32-quickgelu" (OpenAI's weights need the -quickgelu names);
            not read for a folder, which says itself what it is.
        checkpoint: `.safetensors` or a torch file; or the folder.
        fit: see `Preprocess`.

    Raises:
        ValueError: unknown architecture, or a checkpoint that does not fit; one line.
    """
    path = Path(checkpoint)
    if path.is_dir():
        config = _read_config(path / CONFIG)
        clip = open_clip.CLIP(**config["model_cfg"])
        tokenize, path = _own_tokenizer(path), path / WEIGHTS
    else:
        clip = make_clip(architecture)
        tokenize = open_clip.get_tokenizer(architecture)
    load_weights(clip, read_tensors(path), path, ignore=OPENAI_SIZES)
    return ClipTower(clip.eval().requires_grad_(False), tokenize, fit)


def make_clip(architecture: str) -> open_clip.CLIP:
    """An open_clip model of that name with random weights. Raises ValueError for an unknown name."""
    if open_clip.get_model_config(architecture) is None:
        raise ValueError(f"architecture={architecture!r} is not one of open_clip's (open_clip.list_models())")
    return open_clip.create_model(architecture, pretrained=None)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; the folder must be in open_clip's layout") from None


def _own_tokenizer(folder: Path):
    """The folder's `CLIPTokenizer`, called as open_clip calls its own: prompts -> (B, L) ids."""
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    length = tokenizer.model_max_length

    def tokenize(prompts: Sequence[str]) -> Tensor:
        out = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids = out.input_ids
        # open_clip pools at the largest id, which is the end token; what follows it is padding, 0 as in its own
        last = (ids == tokenizer.eos_token_id).int().argmax(-1, keepdim=True)
        return torch.where(torch.arange(length) > last, 0, ids)

    return tokenize


def openai_tokenizer(length: int = 77):
    """OpenAI's byte-pair encoding from open_clip's packaged file: no hub."""
    return SimpleTokenizer(context_length=length)


class CLIPScore(RewardModel):
    """100 * cosine of the image's and the prompt's embedding; not scaled by 2.5, single items not clamped."""

    convention = "100 * cosine, bicubic to the short side, centre crop"

    def __init__(self, tower: ClipTower, scale: float = 100.0):
        super().__init__()
        self.tower, self.scale = tower, scale

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check_images(images, prompts)
        with torch.no_grad():
            text = self.tower.text_embedding(prompts)
        return self.scale * (self.tower.image_embedding(images) * text).sum(-1)


class HPSv2(CLIPScore):
    """HPS v2.1: the cosine of its ViT-H/14 times 100, the whole picture padded to a square."""

    convention = "100 * cosine, bicubic to the long side, padded with black"


class PickScore(RewardModel):
    """PickScore v1: a CLIP ViT-H/14 in transformers' layout. The paper's 0.21 is the plain cosine.

    `logits` is the authors' own scale, exp(logit_scale) * cosine.
    """

    convention = "cosine (not times exp(logit_scale)), bicubic to the short side, centre crop"

    def __init__(self, clip: CLIPModel, tokenize):
        super().__init__()
        self.clip, self.tokenize = clip, tokenize
        self.preprocess = Preprocess(clip.config.vision_config.image_size)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check_images(images, prompts)
        ids = self.tokenize(list(prompts)).to(self.device)
        with torch.no_grad():
            # The end token decides where the text is pooled; what is padded behind it is never seen (causal mask).
            text = F.normalize(self.clip.get_text_features(input_ids=ids).pooler_output.float(), dim=-1)
        pixels = self.preprocess(images.float()).to(self.clip.dtype)
        image = F.normalize(self.clip.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)
        return (image * text).sum(-1)

    def logits(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """exp(logit_scale) * cosine, (B,)."""
        return self.clip.logit_scale.exp().float() * self(images, prompts)


def load_pick_score(folder: str | Path) -> PickScore:
    """PickScore from a folder with config.json and model.safetensors (the hub's `yuvalkirstain/PickScore_v1`).

    Raises:
        ValueError: the folder cannot be loaded, in one line.
    """
    folder = Path(folder)
    clip = load_component(CLIPModel, folder)
    length = clip.config.text_config.max_position_embeddings
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return PickScore(clip, _own_tokenizer(folder))
    return PickScore(clip, openai_tokenizer(length))
