"""Distil a text-to-image model into a 1-8 step one by trajectory segmented consistency distillation, or another method.

python jobs/tscd.py tiny                                            # the embedded model, minutes on a CPU
python jobs/tscd.py tiny --method perflow                           # the same by another published method
python jobs/tscd.py sd15 --teacher PATH --data.shards 's3://...'    # Stable Diffusion 1.5
python jobs/tscd.py sdxl --teacher PATH --data.shards 's3://...'    # SDXL
ray job submit --working-dir . -- python jobs/tscd.py tiny          # on a cluster
python jobs/tscd.py sdxl --plan                                     # no training: throughput to 256 GPUs, and the limit
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

from hypersd_ray.config.cli import parse, run_job
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.recipes import RECIPES


def main() -> None:
    """Train, draw, and say where everything is."""
    arguments, rates = split_plan(sys.argv[1:])
    if rates is not None:
        print_plan(arguments, rates)
        return
    config = parse(RECIPES, TSCDConfig, __doc__, arguments)
    from hypersd_ray.trainer import run  # Ray and torch come after the configuration is known to be right

    result = run.train(config)
    report(config, result)
    for path in draw(config, result.folder):
        print(f"picture  {path}")


def split_plan(arguments: list[str]) -> tuple[list[str], list[str] | None]:
    """The command line without `--plan [name=number ...]`, and those; None where it is not asked for."""
    if "--plan" not in arguments:
        return arguments, None
    at = arguments.index("--plan")
    end = at + 1
    while end < len(arguments) and "=" in arguments[end] and not arguments[end].startswith("-"):
        end += 1
    return arguments[:at] + arguments[end:], arguments[at + 1 : end]


def print_plan(arguments: list[str], rates: list[str]) -> None:
    """The plan of the run that `arguments` ask for. The teacher may be left out where the recipe's name says the family: no
    weight is read, and no cluster asked for."""
    from hypersd_ray.models.shapes import write_shape
    from hypersd_ray.tuning.plan import plan

    recipe = next((argument for argument in arguments if argument in ("sd15", "sdxl")), None)
    with tempfile.TemporaryDirectory() as folder:
        if recipe is not None and not any(argument.partition("=")[0] == "--teacher" for argument in arguments):
            write_shape(Path(folder), "sdxl" if recipe == "sdxl" else "sd")
            arguments = [*arguments, "--teacher", folder]
        print(plan(parse(RECIPES, TSCDConfig, __doc__ or "", arguments), rates))


def draw(config: TSCDConfig, folder: str) -> list[str]:
    """Loss curves, and the sample grid of the last stage's LoRA, written into the run's folder; returns their paths.

    The grid of a model on GPUs is drawn where a worker would be.
    """
    from evaluation.pictures import draw_curves, draw_grid, placed_rows
    from hypersd_ray.trainer import storage
    from hypersd_ray.trainer.kinds.tscd import product

    names = ["curves.png"]
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary)
        (made / "metrics.jsonl").write_text(storage.read_text(f"{folder}/metrics.jsonl"))
        draw_curves(made / "metrics.jsonl", made / "curves.png")
        if not config.full_unet:
            k, omega = config.distill.k_list[-1], (config.distill.omega_min + config.distill.omega_max) / 2
            rows = placed_rows(config, f"{folder}/{product(config, k)}", omega)
            title = f"same noise, teacher at guidance {omega:g}, student after k = {k}"
            draw_grid(rows, config.run.prompts, made / "grid.png", title)
            names.insert(0, "grid.png")
        for name in names:
            storage.put(made / name, f"{folder}/{name}")
    return [f"{folder}/{name}" for name in names]


def report(config: TSCDConfig, result) -> None:
    """What came out, and where it is."""
    from hypersd_ray.models.cards import unet_usage
    from hypersd_ray.models.export import usage
    from hypersd_ray.trainer.kinds.tscd import lora_metadata, product, unet_card

    k = config.distill.k_list[-1]
    if result.was_finished:
        print(f"\nRun {config.run.name} was finished before, nothing was trained: set run.name to start another")
    print(
        f"\nRun {config.run.name}: {result.metrics.get('skipped', 0)} steps skipped, trainer waited for data {result.metrics.get('data_wait_share', 0):.2%} of the time"
    )
    if config.full_unet:
        print(f"UNet     {result.folder}/unet-k{k} (model card in its README.md)")
    else:
        print(f"LoRA     {result.folder}/{product(config, k)} (one per stage beside it, and in Kohya's layout)")
    if result.rejected:
        print(f"data     {result.rejected}")
    print(f"config   {result.folder}/config.yaml")
    print(f"logs     tensorboard --logdir {result.folder}/tensorboard")
    if config.full_unet:
        lines = unet_usage(f"{result.folder}/unet-k{k}", unet_card(config, k))
    else:
        lines = usage(f"{result.folder}/{product(config, k)}", lora_metadata(config, k), base=config.teacher)
    print(f"\nUse it:\n{lines}\n", flush=True)


if __name__ == "__main__":
    run_job(main)
