"""What a denoiser is told beside x_t and t."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Text (and for SDXL size) conditioning of a batch.

    Attributes:
        prompt_embeds: (B, L, D) hidden states of the text encoder(s).
        pooled: (B, P) pooled text embedding; SDXL only.
        time_ids: (B, 6) original height, width, crop top, left, target height, width; SDXL only.
    """

    prompt_embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def _map(self, fn) -> Conditioning:
        pooled = None if self.pooled is None else fn(self.pooled)
        return Conditioning(fn(self.prompt_embeds), pooled, None if self.time_ids is None else fn(self.time_ids))

    def to(self, *args, **kwargs) -> Conditioning:
        """As `Tensor.to`, on each part."""
        return self._map(lambda part: part.to(*args, **kwargs))

    def cast(self, dtype: torch.dtype) -> Conditioning:
        """The embeddings in `dtype`; the sizes stay exact (bfloat16 has no 1365, and they go through a sine)."""
        pooled = None if self.pooled is None else self.pooled.to(dtype)
        return Conditioning(self.prompt_embeds.to(dtype), pooled, self.time_ids)

    def expand(self, batch: int) -> Conditioning:
        """A conditioning of batch 1 repeated `batch` times, without a copy."""
        return self._map(lambda part: part.expand(batch, *part.shape[1:]))

    def rows(self, which: slice | Tensor) -> Conditioning:
        """Some rows of the batch, by a slice or by their numbers."""
        return self._map(lambda part: part[which])

    def with_time_ids(self, time_ids: Tensor | None) -> Conditioning:
        """The same text with another size conditioning."""
        return Conditioning(self.prompt_embeds, self.pooled, time_ids)

    def emptied(self, null: Conditioning, empty: Tensor) -> Conditioning:
        """The text of `null` (batch 1) in the rows where `empty` (B,) is true; the sizes stay."""

        def choose(ours: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            if ours is None or theirs is None:
                return ours
            return torch.where(empty.view(-1, *[1] * (ours.ndim - 1)), theirs.to(ours), ours)

        embeds = torch.where(empty.view(-1, 1, 1), null.prompt_embeds.to(self.prompt_embeds), self.prompt_embeds)
        return Conditioning(embeds, choose(self.pooled, null.pooled), self.time_ids)

    def added_kwargs(self) -> dict[str, Tensor] | None:
        """diffusers' `added_cond_kwargs`; None for SD1.5."""
        if self.pooled is None:
            return None
        assert self.time_ids is not None, "SDXL's UNet needs the size conditioning beside the pooled embedding"
        return {"text_embeds": self.pooled, "time_ids": self.time_ids}


def size_time_ids(height: float, width: float, batch: int, device: torch.device | str = "cpu") -> Tensor:
    """SDXL's size conditioning of an uncropped picture, (B, 6)."""
    size = [float(height), float(width)]
    return torch.tensor([[*size, 0, 0, *size]], device=device).repeat(batch, 1)


def square_time_ids(side: float, batch: int, device: torch.device | str = "cpu") -> Tensor:
    """Of a square one, the default of diffusers' pipelines."""
    return size_time_ids(side, side, batch, device)


def concatenate(first: Conditioning, second: Conditioning) -> Conditioning:
    """Both batches as one."""
    return Conditioning(
        torch.cat([first.prompt_embeds, second.prompt_embeds]),
        None if first.pooled is None or second.pooled is None else torch.cat([first.pooled, second.pooled]),
        None if first.time_ids is None or second.time_ids is None else torch.cat([first.time_ids, second.time_ids]),
    )
