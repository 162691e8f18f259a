"""Preferences of the embedded world: which of two pictures for a caption somebody would prefer, and why.

No person has judged these pictures. The oracle, who teaches the embedded judges, knows what a picture shows and how much it is spoilt: it gives the mark
of `spoiling.quality`, less a fine for each attribute that is not the caption's, and prefers the higher. A team's own taste, which a judge may learn then, is another matter (`write_taste`).

Shapes: N pictures in V versions, B pairs; pair members (B, 2): version and picture.
"""

from __future__ import annotations

import io
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hypersd_ray.embedded.compose import read_caption
from hypersd_ray.embedded.spoiling import Bank

FINES = (2.0, 6.0, 2.0)
"""For another style, other objects, another background; a mark goes from 1 to 10."""
MARGIN = 0.75
"""A smaller difference nobody could see."""
OWN = 0.6
"""Share of a pair's pictures that are of the caption; the others differ from it in one attribute, where there are such."""

MOST_PARTNERS = 16
"""Pictures kept of those that differ from one in a given attribute alone."""


@dataclass(frozen=True)
class Drawn:
    """prompt (B,): whose caption; chosen, rejected (B, 2): version and picture."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor


class Preferences:
    """Pairs drawn from a bank."""

    def __init__(self, bank: Bank):
        self.bank = bank
        numbers: list[dict[object, int]] = [{}, {}, {}]
        shown = [read_caption(caption) for caption in bank.captions]
        self.attributes = torch.tensor(
            [[seen.setdefault(value, len(seen)) for seen, value in zip(numbers, s, strict=True)] for s in shown]
        )
        self.partners = self._find_partners()

    def _find_partners(self) -> list[list[int]]:
        """Of each picture those that differ in one attribute alone."""
        rows = [tuple(row) for row in self.attributes.tolist()]
        found: list[list[int]] = [[] for _ in rows]
        for left_out in range(3):
            groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
            for i, row in enumerate(rows):
                groups[row[:left_out] + row[left_out + 1 :]].append(i)
            for group in groups.values():
                for place, i in enumerate(group):
                    turned = (group[(place + n) % len(group)] for n in range(1, min(MOST_PARTNERS + 1, len(group))))
                    found[i] += [j for j in turned if rows[j][left_out] != rows[i][left_out]]
        return found

    def marks(self, prompt: Tensor, version: Tensor, picture: Tensor) -> Tensor:
        """The oracle's, (B,)."""
        wrong = self.attributes[prompt] != self.attributes[picture]
        return self.bank.marks[version, picture] - (wrong * torch.tensor(FINES)).sum(1)

    def draw(self, count: int, generator: torch.Generator) -> Drawn:
        """`count` pairs that the oracle can tell apart."""
        parts: list[Drawn] = []
        while sum(len(part.prompt) for part in parts) < count:
            prompt = torch.randint(len(self.attributes), (2 * count,), generator=generator)
            members = torch.stack([self._members(prompt, generator) for _ in range(2)])
            marks = torch.stack([self.marks(prompt, *m.unbind(1)) for m in members])
            better = marks.argmax(0)
            keep, row = (marks[0] - marks[1]).abs() >= MARGIN, torch.arange(len(prompt))
            parts.append(Drawn(prompt[keep], members[better, row][keep], members[1 - better, row][keep]))
        fields = zip(*((part.prompt, part.chosen, part.rejected) for part in parts), strict=True)
        return Drawn(*(torch.cat(field)[:count] for field in fields))

    def _members(self, prompt: Tensor, generator: torch.Generator) -> Tensor:
        """A picture for each prompt (B,) -> (B, 2)."""
        own = torch.rand(len(prompt), generator=generator) < OWN
        chance = torch.randint(2**31, (len(prompt),), generator=generator).tolist()
        everyone = range(len(self.attributes))
        others = [
            of[c % len(of)]
            for i, c in zip(prompt.tolist(), chance, strict=True)
            if (of := self.partners[i] or everyone)
        ]
        version = torch.randint(len(self.bank.marks), (len(prompt),), generator=generator)
        return torch.stack([version, torch.where(own, prompt, torch.tensor(others))], 1)


NEAREST, FARTHEST, TOLD_APART = 1.35, 0.8, 1.15
"""Magnifications of a taste's pictures, and how much larger one of a pair is at least."""


def magnified(images: Tensor, by: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] enlarged `by` (N,) about their middle; below 1 the rim goes on outwards."""
    turn = torch.zeros(len(images), 2, 3)
    turn[:, 0, 0] = turn[:, 1, 1] = 1 / by
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def write_taste(images: Tensor, captions: list[str], path: Path, seed: int = 0) -> int:
    """Write preference pairs of a team that wants its objects large, on which the oracle has no opinion: a parquet file
    (prompt, chosen, rejected) of the pictures, uint8 (N, 3, H, W), each seen from two distances; returns how many."""
    generator = torch.Generator().manual_seed(seed)
    by = FARTHEST * (NEAREST / FARTHEST) ** torch.rand(2, len(images), generator=generator)
    near, far = by.max(0).values, by.min(0).values
    kept = torch.nonzero(near >= TOLD_APART * far)[:, 0]
    clean = images[kept].float() / 255
    sides = {
        name: [_png(picture) for picture in magnified(clean, amount[kept])]
        for name, amount in (("chosen", near), ("rejected", far))
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"prompt": [captions[i] for i in kept.tolist()]} | sides), path)
    return len(kept)


def _png(image: Tensor) -> bytes:
    data = io.BytesIO()
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(data, "PNG")
    return data.getvalue()
