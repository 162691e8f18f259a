"""Teach a distilled LoRA what people like and what objects look like: reward models and SOLO, as shared Ray actors.

Examples:

    python jobs/feedback.py tiny --lora runs/tiny-minutes/lora/tscd-k1.safetensors                  # minutes on a CPU
    python jobs/feedback.py tiny --lora LORA --learn reward                                         # without structure
    python jobs/feedback.py sd15 --teacher PATH --lora LORA --models FOLDER --data.shards 's3://...'
    ray job submit --working-dir . -- python jobs/feedback.py tiny --lora LORA                      # on a cluster
    python jobs/feedback.py sdxl --plan                             # no training: throughput to 256 GPUs, and the limit
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

from hypersd_ray.config.cli import PLAN_OPTIONS, parse, run_job
from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.recipes import FEEDBACK_RECIPES


def main() -> None:
    """Train, say where everything is, and draw."""
    if "--plan" in sys.argv:
        from hypersd_ray.tuning.plan import print_plan

        print_plan(FEEDBACK_RECIPES, FeedbackConfig, sys.argv[1:])
        return
    config = parse(FEEDBACK_RECIPES, FeedbackConfig, __doc__, sys.argv[1:], PLAN_OPTIONS)
    from hypersd_ray.trainer import run  # Ray and torch come after the configuration is known to be right

    result = run.train(config)
    report(config, result)
    for path in draw(config, result.folder):
        print(f"picture  {path}")


def draw(config: FeedbackConfig, folder: str) -> list[str]:
    """The model before and after from the same noise, and the curves, in the run's folder; returns their paths.

    The grid of a model on GPUs is drawn where a worker would be.
    """
    from evaluation import ending
    from evaluation.pictures import placed_feedback_rows
    from hypersd_ray.trainer import storage
    from hypersd_ray.trainer.kinds.feedback import MERGED

    loras = {"before": storage.absolute(config.tscd), "after": f"{folder}/lora/{MERGED}.safetensors"}
    rows = placed_feedback_rows(config, loras, config.run.prompts, sorted(config.refl.steps))
    return ending.draw(folder, rows, config.run.prompts, "same noise, the TSCD model before feedback and after")


def report(config: FeedbackConfig, result) -> None:
    """What came out, and where it is."""
    from evaluation import ending
    from hypersd_ray.models.export import usage
    from hypersd_ray.models.lora_file import read_lora
    from hypersd_ray.trainer import storage
    from hypersd_ray.trainer.kinds.feedback import FEEDBACK, MERGED

    metrics = result.metrics
    ending.say_how_it_went(config.run.name, result)
    dropped = {name.split("/")[1]: int(n) for name, n in metrics.items() if name.startswith("dropped/") and n}
    if dropped:
        print(f"samples left out because their score was NaN or infinite: {dropped}")
    if metrics.get("hacking"):
        print("warning: at the end the trained rewards rose while the held-out ones fell; look at the pictures")
    merged = f"{result.folder}/lora/{MERGED}.safetensors"
    print(f"LoRA     {merged} (TSCD and feedback in one; in Kohya's layout beside it)")
    print(f"LoRA     {result.folder}/lora/{FEEDBACK}.safetensors (feedback alone; jobs/export.py merges it otherwise)")
    ending.say_where_it_is(result)
    with storage.local_copy(merged, "run") as file:
        metadata = read_lora(file)[1]
    assert metadata is not None  # the run wrote it
    print("\nUse it:\n" + usage(merged, metadata, base=config.teacher) + "\n", flush=True)


if __name__ == "__main__":
    run_job(main)
