"""The actor that turns crops and captions into what the trainer eats.

Shapes
    pixels         (B, 3, R, R) uint8
    latents        (B, C, h, w) float16, scaled by the VAE's factor
    prompt_embeds  (B, L, D) float16
    pooled         (B, P) float16, SDXL only
    time_ids       (B, 6) float32, SDXL only
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

TENSOR_COLUMNS = ("latents", "prompt_embeds", "pooled", "time_ids")


class LatentEncoder:
    """Holds the frozen VAE and text encoder(s). For `Dataset.map_batches` over an actor pool.

    A row that comes in is one chunk of rows of one shard (see pipeline.py), so call it with batch_size=1.
    """

    def __init__(self, model_path: str, dtype: str, device: str = "auto") -> None:
        # diffusers and transformers load where the encoder runs, not in every process that builds a pipeline.
        from hypersd_ray.models.encoders import load_encoders

        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.encoders = load_encoders(model_path, getattr(torch, dtype), self.device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Encode each chunk by itself; the rows come out one by one, in order."""
        chunks = [{name: column[i] for name, column in batch.items()} for i in range(len(batch["key"]))]
        encoded = [self.encode(chunk) for chunk in chunks]
        return {name: np.concatenate([rows[name] for rows in encoded]) for name in encoded[0]}

    @torch.no_grad()
    def encode(self, chunk: dict[str, Any]) -> dict[str, np.ndarray]:
        """One chunk of n rows -> columns of n rows: key, caption, row, window and the tensors above."""
        captions = [str(c) for c in chunk["caption"]]
        pixels = torch.from_numpy(np.array(chunk["pixels"], dtype=np.uint8)).to(self.device)
        prompts = self.encoders.encode_prompts(captions)
        n = len(captions)
        rows = {
            "key": np.asarray(chunk["key"], dtype=object),
            "caption": np.array(captions, dtype=object),
            "row": np.asarray(chunk["row"], dtype=np.int64),
            "shard": np.array([chunk["shard"]] * n, dtype=object),
            "window": np.full(n, chunk["window"], dtype=np.int64),
            "latents": _half(self.encoders.encode_images(pixels)),
            "prompt_embeds": _half(prompts.prompt_embeds),
        }
        if self.encoders.is_sdxl:
            assert prompts.pooled is not None, "SDXL's second text encoder gives a pooled embedding"
            rows["pooled"] = _half(prompts.pooled)
            rows["time_ids"] = np.asarray(chunk["time_ids"], dtype=np.float32)
        return rows


def _half(x: torch.Tensor) -> np.ndarray:
    return x.to(torch.float16).cpu().numpy()
