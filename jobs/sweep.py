"""Find the schedule of the adversarial and the MSE weights, learning rate, guidance and EMA by measured quality.

Examples:

    python jobs/sweep.py tiny                                                    # the embedded model, on a CPU
    python jobs/sweep.py tiny --name sweep-optuna --trials 30 --search optuna    # Optuna chooses by the trials before
    python jobs/sweep.py sd15 --teacher PATH --prompts FILE --base.data.shards 's3://...'
    python jobs/tscd.py --config runs/sweep-tiny-minutes/best.yaml               # train what came out
    ray job submit --working-dir . -- python jobs/sweep.py tiny                  # on a cluster
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

from hypersd_ray.config.cli import parse, run_job
from hypersd_ray.config.sweep import SweepConfig
from hypersd_ray.recipes import SWEEP_RECIPES


def main() -> None:
    """Sweep, compare the best with the base on other prompts, and say where everything is."""
    config = parse(SWEEP_RECIPES, SweepConfig, __doc__)
    from evaluation.sweep import compare, draw_parallel, table, write_csv
    from hypersd_ray.trainer import storage
    from hypersd_ray.tuning import sweep  # Ray and torch come after the configuration is known to be right

    config = sweep.from_here(config)
    outcome = sweep.run_sweep(config)
    folder = outcome.folder
    storage.write_text(f"{folder}/best.yaml", sweep.best_text(config, outcome))
    with tempfile.TemporaryDirectory() as temporary:
        write_csv(config, outcome, Path(temporary) / "trials.csv")
        draw_parallel(config, outcome, Path(temporary) / "trials.png")
        for name in ("trials.csv", "trials.png"):
            storage.put(Path(temporary) / name, f"{folder}/{name}")
    print(f"\n{table(config, outcome)}")
    text = compare(config, outcome)
    storage.write_text(f"{folder}/comparison.md", text + "\n")
    print(f"\n{text}\n\nbest     {folder}/best.yaml (python jobs/tscd.py --config {folder}/best.yaml)")
    print(f"table    {folder}/trials.csv\npicture  {folder}/trials.png\nlogs     tensorboard --logdir {folder}")


if __name__ == "__main__":
    run_job(main)
