"""Encode image-text shards once into latent parquet, which later runs read (`--data.shards OUT`).

    python jobs/precompute.py --model PATH --out DIR --data.shards 's3://B/{000..099}.tar' --data.resolution 512

Started again, it goes on behind the last whole shard.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

from hypersd_ray.config.base import Strict
from hypersd_ray.config.cli import read_options, run_job
from hypersd_ray.config.data import DataConfig


class PrecomputeConfig(Strict):
    """What to encode, with which model, into which folder."""

    model: str
    """Folder of the teacher in diffusers format; its VAE and text encoder(s) are used."""
    out: str
    """Folder for the latents, any fsspec URL."""
    data: DataConfig
    """The shards and how to read them."""


def main() -> None:
    """Precompute, print what was made."""
    config: PrecomputeConfig = read_options(PrecomputeConfig, sys.argv[1:], __doc__ or "")
    from hypersd_ray.data.precompute import precompute, validate

    validate(config.data, config.model, config.out)
    from hypersd_ray.trainer.room import check_pool  # Ray comes after the configuration is known to be right
    from hypersd_ray.trainer.run import connect

    connect()
    check_pool(config.data.encoder, "data.encoder", config.data.reader_cpus)
    started = time.perf_counter()

    def progress(done: int, shards: int, rows: int) -> None:
        print(f"shard {done}/{shards}, {rows} rows, {rows / (time.perf_counter() - started):.0f} rows/s", flush=True)

    made = precompute(config.data, config.model, config.out, progress)
    rejected = ", ".join(f"{reason} {count}" for reason, count in made.rejects.items()) or "none"
    there = f"{made.shards_skipped} were there"
    print(f"{made.rows} rows of {made.seen} in {made.shards} shards ({there}), {made.rows_per_s:.0f} rows/s")
    print(f"rejected: {rejected}" + (f", listed in {made.out.rstrip('/')}/rejects.jsonl" if made.rejects else ""))
    print(f"latents in {made.out}: --data.shards {made.out}")


if __name__ == "__main__":
    run_job(main)
