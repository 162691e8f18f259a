"""Distil a text-to-image model into a 1-8 step one by trajectory segmented consistency distillation, or another method.

Examples:

    python jobs/tscd.py tiny                                            # the embedded model, minutes on a CPU
    python jobs/tscd.py tiny --method perflow                           # the same by another published method
    python jobs/tscd.py sd15 --teacher PATH --data.shards 's3://...'    # Stable Diffusion 1.5
    python jobs/tscd.py sdxl --teacher PATH --data.shards 's3://...'    # SDXL
    ray job submit --working-dir . -- python jobs/tscd.py tiny          # on a cluster
    python jobs/tscd.py sdxl --plan                                     # no training: throughput to 256 GPUs, and the limit
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

from hypersd_ray.config.cli import PLAN_OPTIONS, parse, run_job
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.recipes import RECIPES


def main() -> None:
    """Train, draw, and say where everything is."""
    if "--plan" in sys.argv:
        from hypersd_ray.tuning.plan import print_plan

        print_plan(RECIPES, TSCDConfig, sys.argv[1:])
        return
    config = parse(RECIPES, TSCDConfig, __doc__, sys.argv[1:], PLAN_OPTIONS)
    from hypersd_ray.trainer import run  # Ray and torch come after the configuration is known to be right

    result = run.train(config)
    report(config, result)
    for path in draw(config, result.folder):
        print(f"picture  {path}")


def draw(config: TSCDConfig, folder: str) -> list[str]:
    """Loss curves, and the sample grid of the last stage's LoRA, written into the run's folder; returns their paths.

    The grid of a model on GPUs is drawn where a worker would be.
    """
    from evaluation import ending
    from evaluation.pictures import placed_rows
    from hypersd_ray.trainer.kinds.tscd import product

    k, omega = config.distill.k_list[-1], (config.distill.omega_min + config.distill.omega_max) / 2
    rows = {} if config.full_unet else placed_rows(config, f"{folder}/{product(config, k)}", omega)
    title = f"same noise, teacher at guidance {omega:g}, student after k = {k}"
    return ending.draw(folder, rows, config.run.prompts, title)


def report(config: TSCDConfig, result) -> None:
    """What came out, and where it is."""
    from evaluation import ending
    from hypersd_ray.models.cards import unet_usage
    from hypersd_ray.models.export import usage
    from hypersd_ray.trainer.kinds.tscd import lora_metadata, product, unet_card

    k = config.distill.k_list[-1]
    ending.say_how_it_went(config.run.name, result)
    if config.full_unet:
        print(f"UNet     {result.folder}/unet-k{k} (model card in its README.md)")
    else:
        print(f"LoRA     {result.folder}/{product(config, k)} (one per stage beside it, and in Kohya's layout)")
    ending.say_where_it_is(result)
    if config.full_unet:
        lines = unet_usage(f"{result.folder}/unet-k{k}", unet_card(config, k))
    else:
        lines = usage(f"{result.folder}/{product(config, k)}", lora_metadata(config, k), base=config.teacher)
    print(f"\nUse it:\n{lines}\n", flush=True)


if __name__ == "__main__":
    run_job(main)
