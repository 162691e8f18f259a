"""Make an image set from a list of prompts with a base model, over Ray Data: shards that the other jobs read.

    python jobs/synthesize.py --model PATH --prompts prompts.txt --out s3://bucket/styles --pool.num-gpus 1

The paper's feedback stage has some 140,000 such images of styles (Sec. 4.1). Started again, it makes what is missing.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

from hypersd_ray.config.cli import read_options, run_job
from hypersd_ray.config.synthesize import SynthesizeConfig


def main() -> None:
    """Make the images and say where they are."""
    config: SynthesizeConfig = read_options(SynthesizeConfig, sys.argv[1:], __doc__ or "")
    from hypersd_ray.data.synthesize import check, synthesize
    from hypersd_ray.trainer.room import check_pool
    from hypersd_ray.trainer.run import connect

    check(config)
    connect()
    check_pool(config.pool, "pool")
    started = time.perf_counter()

    def progress(done: int, shards: int, images: int) -> None:
        print(
            f"shard {done}/{shards}, {images} images, {images / (time.perf_counter() - started):.2f} images/s",
            flush=True,
        )

    made = synthesize(config, progress)
    print(f"{made.images} images made, {made.shards} shards ({made.shards_skipped} were there) in {made.out}")
    print(f"use them: --data.shards '{made.out.rstrip('/')}/*.tar'")


if __name__ == "__main__":
    run_job(main)
