"""The configuration of an image set that a base model makes from a list of prompts (the style images of Sec. 4.1)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hypersd_ray.config.base import CombinationError, Strict
from hypersd_ray.config.data import ActorPool


class SynthesizeConfig(Strict):
    """Prompts in, WebDataset shards out."""

    model: str
    """Folder of the base model in diffusers' layout."""
    prompts: str
    """Text file with a prompt a line, or parquet with a column `caption` (or `prompt`); any fsspec URL."""
    out: str
    """Folder for the shards, any fsspec URL."""
    images_per_prompt: int = Field(default=1, ge=1)
    """Images of each prompt, each from its own noise."""
    steps: int = Field(default=25, ge=1, le=1000)
    """Sampling steps, with the model's own scheduler."""
    guidance: float = Field(default=7.5, ge=0)
    """Guidance scale."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    seed: int = 0
    """The noise of an image is a function of it, the prompt and the image's number."""
    per_shard: int = Field(default=512, ge=1)
    """Images of one shard: what is lost when a run is killed."""
    image_format: Literal["png", "webp", "jpg"] = "png"
    """Of the files; webp is lossless too, jpg has quality 95."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number type of the model."""
    pool: ActorPool = ActorPool(batch_size=16)
    """Actors that make the images: `batch_size` images at a time on `num_gpus` each."""

    @model_validator(mode="after")
    def _fits(self) -> SynthesizeConfig:
        if self.precision != "fp32" and not self.pool.num_gpus:
            raise CombinationError(
                f"precision={self.precision} with pool.num_gpus=0: half precision is for GPUs; set precision=fp32"
            )
        return self
