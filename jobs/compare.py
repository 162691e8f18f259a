"""Every method of the paper's comparison on one teacher, one stream of data and one budget, judged by one harness.

    python jobs/compare.py tiny                       # the embedded model: three rates, then three seeds; hours on 2 cores
    python jobs/compare.py tiny --plan                # what is done and what is to do
    python jobs/compare.py tiny --minutes 60          # begin nothing new after an hour; the same command goes on
    python jobs/compare.py tiny --methods lcm tscd --budget 3200 --out runs/compare-short
    python jobs/compare.py ablations                  # TSCD with one part changed at a time, each once (--seeds 0 1 2: thrice)

    taskset -c 0 python jobs/compare.py tiny & taskset -c 1 python jobs/compare.py tiny

Several processes share one folder: each takes a training that no other has, and takes over from one of this host that
ended. Pinned to a core each, two take half the time of one, some 3.5 hours in place of 7: a training of dmd or hyper-sd took 15
minutes of a core, of perflow and tscd-feedback 10, of pd and tscd-dmd 8, of the others 4 to 6; the table 20 minutes of two cores.

Each training is a run as jobs/tscd.py, jobs/onestep.py and jobs/feedback.py make it; the last thing is the report.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

from hypersd_ray.config.cli import parse, run_job
from hypersd_ray.config.compare import CompareConfig
from hypersd_ray.recipes.compare import COMPARE_RECIPES


def main() -> None:
    """Train what is missing, judge, report."""
    config = parse(COMPARE_RECIPES, CompareConfig, __doc__)
    from evaluation.harness.comparison import Comparison
    from evaluation.harness.pieces import write_json
    from evaluation.output import progress

    comparison = Comparison(config, progress)
    if config.plan:
        print("\n".join(comparison.plan()))
        return
    from evaluation.report.build import write_report

    comparison.begin()
    left = comparison.train_all()
    if left:
        print(f"{left} pieces to do: the same command goes on")
        if not config.partial:
            return
    results, rows = comparison.judge()
    write_json(comparison.out / "results.json", results)
    for path in write_report(results, rows, comparison.out, "Few-step methods, one teacher, one budget"):
        print(f"report   {path}")


if __name__ == "__main__":
    run_job(main)
