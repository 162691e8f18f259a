"""Solve the teacher's ODE for every caption: pairs of noise and end point, for `jobs/onestep.py --regression.pairs OUT`.

    python jobs/pairs.py --teacher PATH --data.shards 's3://B/{000..099}.tar' --data.resolution 512 --out DIR \\
        --data.encoder.num-gpus 1 --data.encoder.max-size 8 --precision bf16

The actors of data.encoder do it: without its options that is one, on a CPU, which is for the embedded model alone.
Started again, it goes on behind the last whole file.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

from hypersd_ray.config.cli import read_options, run_job
from hypersd_ray.config.pairs import OdePairsConfig


def main() -> None:
    """Make the pairs and say where they are."""
    config: OdePairsConfig = read_options(OdePairsConfig, sys.argv[1:], __doc__ or "")
    from hypersd_ray.trainer.pairs import check, make_pairs
    from hypersd_ray.trainer.room import check_pool
    from hypersd_ray.trainer.run import connect

    check(config)
    connect()
    check_pool(config.data.encoder, "data.encoder", config.data.reader_cpus)
    started = time.perf_counter()

    def progress(done: int, files: int, rows: int) -> None:
        print(f"file {done}/{files}, {rows} pairs, {rows / (time.perf_counter() - started):.1f} pairs/s", flush=True)

    made = make_pairs(config, progress)
    print(f"{made.rows} pairs in {made.files} files ({made.files_skipped} were there)")
    print(f"pairs in {made.out}: python jobs/onestep.py ... --regression.pairs {made.out}")


if __name__ == "__main__":
    run_job(main)
