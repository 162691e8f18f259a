"""The encoder actor's columns, SDXL's among them, without Ray and without a real model."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hypersd_ray.data.encode import LatentEncoder


class FakeEncoders:
    """Latents = the pixels' means, embeddings = the captions' lengths."""

    def __init__(self, is_sdxl: bool):
        self.is_sdxl = is_sdxl

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.dtype == torch.uint8
        return pixels.float().mean(dim=(1, 2, 3)).reshape(-1, 1, 1, 1).expand(-1, 4, 2, 2)

    def encode_prompts(self, prompts: list[str]) -> SimpleNamespace:
        lengths = torch.tensor([float(len(p)) for p in prompts])
        pooled = lengths[:, None].expand(-1, 5) if self.is_sdxl else None
        return SimpleNamespace(prompt_embeds=lengths[:, None, None].expand(-1, 3, 6), pooled=pooled)


def chunk(window: int, n: int) -> dict:
    return {
        "shard": f"s{window}",
        "window": window,
        "row": np.arange(n),
        "key": [f"{window}-{i}" for i in range(n)],
        "caption": ["x" * (i + 1) for i in range(n)],
        "pixels": np.arange(n, dtype=np.uint8).repeat(3 * 8 * 8).reshape(n, 3, 8, 8),
        "time_ids": np.full((n, 6), 8, dtype=np.float32),
    }


@pytest.mark.parametrize("is_sdxl", [False, True])
def test_chunks_become_rows_in_order(monkeypatch, is_sdxl):
    monkeypatch.setattr("hypersd_ray.models.encoders.load_encoders", lambda *_: FakeEncoders(is_sdxl))
    chunks = [chunk(0, 3), chunk(1, 2)]
    batch = {name: np.empty(2, dtype=object) for name in chunks[0]}
    for i, c in enumerate(chunks):
        for name, value in c.items():
            batch[name][i] = value
    rows = LatentEncoder("model", "float32", "cpu")(batch)
    assert rows["key"].tolist() == ["0-0", "0-1", "0-2", "1-0", "1-1"]
    assert rows["window"].tolist() == [0, 0, 0, 1, 1]
    assert rows["row"].tolist() == [0, 1, 2, 0, 1]
    assert rows["latents"].dtype == rows["prompt_embeds"].dtype == np.float16
    assert rows["latents"][:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1]
    assert rows["prompt_embeds"].shape == (5, 3, 6)
    assert ("pooled" in rows, "time_ids" in rows) == (is_sdxl, is_sdxl)
    if is_sdxl:
        assert rows["pooled"][:, 0].tolist() == [1, 2, 3, 1, 2]
        assert (rows["time_ids"].shape, rows["time_ids"].dtype) == ((5, 6), np.float32)
