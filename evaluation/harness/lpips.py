"""LPIPS (Zhang et al. 2018) between pictures of one prompt: AlexNet's features, unit length, their weighted squared difference.

torchmetrics has the network and the linear weights; AlexNet's own are a file of torchvision's, which is never downloaded here.
Shapes: pictures (B, 3, H, W) in [0, 1] -> (B,).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from evaluation.harness.judges import JudgeSpec, MetricCard
from evaluation.harness.measures import Estimate, Measure, Read, mean_values
from evaluation.harness.prompts import Row
from evaluation.harness.store import Store, shard_name, shards_of
from evaluation.harness.subjects import Cell, by_weights
from hypersd_ray.models.rewards.weights import load_weights, read_tensors


def load_lpips(path: str | Path) -> nn.Module:
    """The network: a, b in [-1, 1] -> (B, 1, 1, 1).

    Raises:
        ValueError: torchmetrics is not installed, or the file is not AlexNet's; one line.
    """
    try:
        from torchmetrics.functional.image.lpips import _LPIPS
    except ModuleNotFoundError:
        raise ValueError("judge lpips needs torchmetrics: pip install 'hypersd-ray[lpips]'") from None
    network = _LPIPS(net="alex", pnet_rand=True)
    slices: dict[str, nn.Module] = {}
    tensors = {name: t for name, t in read_tensors(path).items() if not name.startswith("classifier.")}
    for part in ("slice1", "slice2", "slice3", "slice4", "slice5"):  # AlexNet's layers, under their own numbers
        slices |= dict(getattr(network.net, part).named_children())
    load_weights(nn.ModuleDict({"features": nn.ModuleDict(slices)}), tensors, path)
    return network.eval().requires_grad_(False)


def pairs_of(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells that differ in the noise alone, by the model's weights; those that have no other are left out."""
    return {weights: of for weights, of in by_weights(cells).items() if len(of) > 1}


def file_of(spec: JudgeSpec, cells: Sequence[Cell]) -> str:
    """Where a first cell keeps the mean over all pairs of these."""
    return f"{spec.file}-{'-'.join(str(cell.seed) for cell in cells)}"


def missing_pairs(
    store: Store, groups: Sequence[Sequence[Cell]], rows: Sequence[Row], spec: JudgeSpec, per_shard: int
) -> list[list[Cell]]:
    """Groups that lack a shard."""
    names = [shard_name(part) for part in shards_of(rows, per_shard)]
    return [
        list(cells) for cells in groups
        if any(f"{name}.{file_of(spec, cells)}.npz" not in store.names(cells[0].key) for name in names)
    ]  # fmt: skip


@torch.no_grad()
def measure_pairs(
    out: str, groups: list[list[str]], rows: list[tuple[str, str]], spec: dict[str, str], per_shard: int, device: str,
    batch: int,
) -> None:  # fmt: skip
    """For each group of cells (as JSON) the mean over its pairs, prompt by prompt, shard by shard; what is there stays."""
    store, told = Store(out), JudgeSpec(**spec)  # type: ignore[arg-type]
    network = load_lpips(json.loads(told.config)["checkpoint"]).to(device)
    for cells in ([Cell.from_json(text) for text in group] for group in groups):
        for part in shards_of([Row(*row) for row in rows], per_shard):
            if f"{shard_name(part)}.{file_of(told, cells)}.npz" in store.names(cells[0].key):
                continue
            pictures = [torch.from_numpy(store.read_pictures(cell.key, part)) for cell in cells]
            values = []
            for i in range(0, len(part), batch):
                seen = [(p[i : i + batch].float() / 127.5 - 1).to(device) for p in pictures]
                distances = [network(a, b).flatten() for a, b in itertools.combinations(seen, 2)]
                values.append(torch.stack(distances).mean(0).cpu().numpy())
            store.write_values(cells[0].key, part, file_of(told, cells), np.concatenate(values), [])


def lpips_measure(spec: JudgeSpec) -> Measure:
    """Diversity between pictures of one prompt, as papers tell it."""
    card = MetricCard(
        "lpips", "LPIPS between seeds", f"AlexNet, {Path(json.loads(spec.config)['checkpoint']).name}, linear weights v0.1",
        spec.sha256, "pictures as they are, in [-1, 1]", "mean distance of two pictures of one prompt from different noise",
        note="pictures that leave the prompt raise it too",
    )  # fmt: skip

    def estimate(cells: Sequence[Cell], read: Read) -> Estimate | None:
        groups = list(pairs_of(cells).values())
        firsts = [of[0] for of in groups]
        if not groups:
            return None
        return mean_values(firsts, [read(of[0], file_of(spec, of)) for of in groups])

    def cases(cells: Sequence[Cell], read: Read) -> np.ndarray | None:
        of = pairs_of(cells).get(cells[0].weights_sha256)
        return read(of[0], file_of(spec, of)) if of else None

    return Measure(card, estimate, cases)
