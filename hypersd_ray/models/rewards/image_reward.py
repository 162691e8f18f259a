"""ImageReward on transformers' own BLIP classes, loaded from the published checkpoint.

ViT-L/16 at 224 px, a BERT with cross attention to the patches, an MLP on the first token. The authors' package pins
libraries of 2023; its checkpoint needs only other names, which `from_published` gives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BertTokenizerFast, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from hypersd_ray.models.rewards.aesthetic import HeadV2
from hypersd_ray.models.rewards.preprocess import Preprocess
from hypersd_ray.models.rewards.protocol import RewardModel, check_images
from hypersd_ray.models.rewards.weights import load_weights, read_tensors

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""The published normalisation: rewards of the training set have mean 0 and deviation 1."""
TOKENS = 35

_VISION = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"^norm\.", "post_layernorm."),
)
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.temp", "blip.itm_head.")
"""Parts of BLIP's pretraining that a checkpoint may still carry; the reward does not use them."""


def vision_config(**changes: Any) -> BlipVisionConfig:
    """The published ViT-L/16."""
    published: dict[str, Any] = dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224,
        patch_size=16, layer_norm_eps=1e-6,
    )  # fmt: skip
    return BlipVisionConfig(**published | changes)


def text_config(**changes: Any) -> BlipTextConfig:
    """The published BERT. It is a decoder only in that it has cross attention; it is called as an encoder."""
    published: dict[str, Any] = dict(
        vocab_size=30524, hidden_size=768, encoder_hidden_size=1024, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, layer_norm_eps=1e-12, max_position_embeddings=512, is_decoder=True, hidden_act="gelu",
    )  # fmt: skip
    return BlipTextConfig(**published | changes)


class ImageReward(RewardModel):
    """Human preference of a picture for a prompt; 62% of SD1.4's pictures fall in [-1, 1]."""

    convention = "ImageReward, (r - 0.1672) / 1.0333, bicubic to the short side, centre crop"

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig, tokenizer, mean: float = MEAN, std: float = STD):
        super().__init__()
        self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        self.head = HeadV2(text.hidden_size)
        # The authors' start of Eq. 11's training: scores near 0 for every pair.
        for name, parameter in self.head.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(
                parameter, std=1 / (text.hidden_size + 1)
            )
        self.tokenizer, self.mean, self.std = tokenizer, mean, std
        self.preprocess = Preprocess(vision.image_size)
        self.tokens = min(TOKENS, text.max_position_embeddings)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check_images(images, prompts)
        pixels = self.preprocess(images.float()).to(self.vision.dtype)
        return (self.raw(self.vision(pixel_values=pixels).last_hidden_state, prompts) - self.mean) / self.std

    def raw(self, patches: Tensor, prompts: Sequence[str]) -> Tensor:
        """The head's output before the normalisation, (B,) float32."""
        told = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt"
        ).to(patches.device)
        out = self.text(
            input_ids=told.input_ids,
            attention_mask=told.attention_mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
            is_decoder=False,
        )
        return self.head(out.last_hidden_state[:, 0].float()).squeeze(-1)


def from_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names (`blip.visual_encoder.*`, `blip.text_encoder.*`, `mlp.*`) to ours; what has none keeps its own."""
    named = {}
    for name, tensor in tensors.items():
        if name.startswith("blip.visual_encoder."):
            inner = name.removeprefix("blip.visual_encoder.")
            for pattern, replacement in _VISION:
                inner = re.sub(pattern, replacement, inner)
            named[f"vision.{inner}"] = tensor
        elif name.startswith("blip.text_encoder."):
            inner = name.removeprefix("blip.text_encoder.")
            if inner != "embeddings.position_ids":  # a buffer that older versions stored: 0, 1, 2, ...
                named[f"text.{inner}"] = tensor
        elif name.startswith("mlp."):
            named[f"head.{name.removeprefix('mlp.')}"] = tensor
        else:
            named[name] = tensor
    return named


def make_tokenizer(vocabulary: str | Path) -> BertTokenizerFast:
    """bert-base-uncased with BLIP's two further tokens, from a folder or a `vocab.txt`.

    Raises:
        ValueError: there is no vocabulary.
    """
    path = Path(vocabulary)
    file = path / "vocab.txt" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"{file} does not exist: ImageReward needs bert-base-uncased's vocab.txt: set the reward's `tokenizer`"
        )
    words = {word: i for i, word in enumerate(file.read_text(encoding="utf-8").splitlines())}
    tokenizer = BertTokenizerFast(vocab=words, do_lower_case=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    return tokenizer


def save_image_reward(model: ImageReward, folder: str | Path) -> None:
    """A folder that `load_image_reward` reads: sizes, normalisation, weights and tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"vision": _plain(model.vision.config), "text": _plain(model.text.config)}
    (folder / "config.json").write_text(json.dumps(sizes | {"mean": model.mean, "std": model.std}, indent=1))
    save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    model.tokenizer.save_pretrained(folder)


def _plain(config: Any) -> dict[str, Any]:
    """What of a transformers config differs from its class's defaults, as JSON has it."""
    return {k: v for k, v in config.to_diff_dict().items() if isinstance(v, int | float | str | bool)}


def load_image_reward(checkpoint: str | Path, vocabulary: str | Path | None = None) -> ImageReward:
    """The published `ImageReward.pt` with bert-base-uncased's vocabulary, or a folder of `save_image_reward`.

    Raises:
        ValueError: file, missing and unexpected names in one line.
    """
    path = Path(checkpoint)
    if path.is_dir():
        try:
            sizes = json.loads((path / "config.json").read_text())
            vision, text = BlipVisionConfig(**sizes["vision"]), BlipTextConfig(**sizes["text"])
            mean, std = float(sizes["mean"]), float(sizes["std"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}/config.json cannot be read: {error}") from None
        model = ImageReward(vision, text, AutoTokenizer.from_pretrained(path, local_files_only=True), mean, std)
        load_weights(model, read_tensors(path / "model.safetensors"), path / "model.safetensors")
        return model.eval().requires_grad_(False)
    if vocabulary is None:
        raise ValueError(f"{path}: ImageReward needs bert-base-uncased's vocab.txt: set the reward's `tokenizer`")
    tensors = from_published(read_tensors(checkpoint))
    model = ImageReward(vision_config(), text_config(), make_tokenizer(vocabulary))
    load_weights(model, tensors, checkpoint, ignore=UNUSED)
    return model.eval().requires_grad_(False)
