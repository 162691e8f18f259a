"""Merge LoRAs into one, and write it for diffusers and for ComfyUI, A1111 and Forge.

    python jobs/export.py --loras tscd.safetensors feedback.safetensors --out merged.safetensors
    python jobs/export.py --loras tscd.safetensors feedback.safetensors --weights 1 0.7 --rank 64 --out merged.safetensors

Without --rank the merge is exact: the ranks add up. With it each module's update is compressed by SVD, and the error
that makes is said.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

from pydantic import Field

from hypersd_ray.config.base import ConfigError, Strict
from hypersd_ray.config.cli import read_options, run_job


class ExportConfig(Strict):
    """What to merge."""

    loras: tuple[Path, ...]
    """LoRA files of one base model, either layout; the first one's steps and scheduler describe the result."""
    weights: tuple[float, ...] = ()
    """How much of each; all 1 if empty."""
    out: Path
    """The diffusers file; Kohya's layout is written beside it as NAME-kohya.safetensors."""
    rank: int | None = Field(default=None, ge=1)
    """Rank of the result; None is the exact sum's."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number type of the files."""


def main() -> None:
    """Merge, write both layouts, say what came out."""
    config: ExportConfig = read_options(ExportConfig, sys.argv[1:], __doc__ or "")
    weights = config.weights or (1.0,) * len(config.loras)
    if len(weights) != len(config.loras):
        raise ConfigError(f"--weights {config.weights}: {len(weights)} for {len(config.loras)} LoRAs, one each")
    import torch

    from hypersd_ray.models.export import save_diffusers_lora, save_kohya_lora, usage
    from hypersd_ray.models.lora_file import alpha_of, read_lora
    from hypersd_ray.models.merge import Part, compress_lora, concatenate_loras

    parts, described = [], None
    for path, weight in zip(config.loras, weights, strict=True):
        tensors, metadata = read_lora(path)
        described = described or metadata
        parts.append(Part(tensors, alpha_of(tensors, metadata), weight, str(path)))
    if described is None:
        raise ConfigError(f"none of {', '.join(map(str, config.loras))} says its base model and steps: name ours first")
    merged = concatenate_loras(parts)
    exact = merged.rank
    if config.rank is not None and config.rank < exact:
        merged = compress_lora(merged.tensors, merged.alpha, config.rank)
    recipe = " + ".join(f"{w:g} x {p.name}" for w, p in zip(weights, config.loras, strict=True))
    metadata = replace(described, rank=merged.rank, alpha=merged.alpha, extra=described.extra | {"merged": recipe})
    dtype = getattr(torch, config.dtype)
    save_diffusers_lora(merged.tensors, config.out, metadata, dtype)
    kohya = config.out.with_name(f"{config.out.stem}-kohya.safetensors")
    save_kohya_lora(merged.tensors, kohya, metadata, dtype)
    print(f"{recipe}\n{len(merged.tensors) // 2} modules, rank {merged.rank} (exact: {exact})")
    if merged.rank < exact:
        module, error = merged.worst
        mean = sum(merged.errors.values()) / len(merged.errors)
        print(f"error of the updates' norm: mean {mean:.2%}, worst {error:.2%} in {module}")
    for path in (config.out, kohya):
        print(f"LoRA     {path} ({path.stat().st_size / 1e6:.1f} MB)")
    print("\nUse it:\n" + usage(config.out, metadata))


if __name__ == "__main__":
    run_job(main)
