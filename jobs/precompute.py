"""Encode image-text shards once into latent parquet, which later runs read (`--data.shards OUT`).

    python jobs/precompute.py --model PATH --out DIR --data.shards 's3://B/{000..099}.tar' --data.resolution 512

Started again, it goes on behind the last whole shard.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass

import ray
import tyro

from hypersd_ray.config.data import DataConfig
from hypersd_ray.data.precompute import precompute, validate


@dataclass(frozen=True)
class PrecomputeConfig:
    """What to encode, with which model, into which folder."""

    model: str
    """Folder of the teacher in diffusers format; its VAE and text encoder(s) are used."""
    out: str
    """Folder for the latents, any fsspec URL."""
    data: DataConfig
    """The shards and how to read them."""


def main(config: PrecomputeConfig) -> int:
    """Precompute, print what was made; -> the exit status."""
    try:
        validate(config.data, config.model, config.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    started = time.perf_counter()
    # `ray job submit` and a running cluster set the address; without one Ray starts on this machine.
    ray.init(address="auto" if os.environ.get("RAY_ADDRESS") else None, log_to_driver=False, include_dashboard=False)

    def progress(done: int, shards: int, rows: int) -> None:
        print(f"shard {done}/{shards}, {rows} rows, {rows / (time.perf_counter() - started):.0f} rows/s", flush=True)

    try:
        made = precompute(config.data, config.model, config.out, progress)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rejected = ", ".join(f"{reason} {count}" for reason, count in made.rejects.items()) or "none"
    there = f"{made.shards_skipped} were there"
    print(f"{made.rows} rows of {made.seen} in {made.shards} shards ({there}), {made.rows_per_s:.0f} rows/s")
    print(f"rejected: {rejected}" + (f", listed in {made.out.rstrip('/')}/rejects.jsonl" if made.rejects else ""))
    print(f"latents in {made.out}: --data.shards {made.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(PrecomputeConfig)))
