"""Fit an ImageReward-class reward model to preference pairs (Eq. 11), and say how often it agrees with held-out ones.

Examples:

    python jobs/reward.py tiny                                                     # the embedded ImageReward learns a taste
    python jobs/reward.py image_reward --init ImageReward.pt --tokenizer vocab.txt --pairs 'pickapic/*.parquet'
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

from hypersd_ray.config.cli import parse, run_job
from hypersd_ray.config.preference import PreferenceConfig, PreferencePairsConfig
from hypersd_ray.config.run import OptimConfig, RunConfig
from hypersd_ray.embedded import paths

BUILD = Path("runs/reward-tiny-pairs")
"""Where the embedded recipe keeps its pairs."""


def tiny(steps: int = 400, out: str = str(BUILD)) -> PreferenceConfig:
    """The embedded ImageReward, tuned to a team that wants its objects large; the pairs are made where they are missing."""
    folder = Path(out)
    return PreferenceConfig(
        pairs=PreferencePairsConfig(
            train=(str(folder / "train.parquet"),), held_out=(str(folder / "val.parquet"),), resolution=32
        ),
        init=str(paths.EVALUATORS / "image_reward"),
        freeze=0.0,
        steps=steps,
        optim=OptimConfig(lr=3e-4, schedule="cosine", warmup=20, batch=32),
        eval_every=100,
        run=RunConfig(name="reward-tiny", checkpoint_every=100, log_every=20),
    )


def image_reward(init: str, pairs: str, tokenizer: str) -> PreferenceConfig:
    """The published model, fine-tuned on one's own preferences with the authors' settings."""
    return PreferenceConfig(
        pairs=PreferencePairsConfig(train=(pairs,)),
        init=init,
        tokenizer=tokenizer,
        run=RunConfig(name="reward", gpus_per_worker=1),
    )


def build_tiny(config: PreferenceConfig) -> None:
    """Pairs of the `tiny` recipe."""
    from hypersd_ray.embedded.pictures import load_pictures
    from hypersd_ray.embedded.preferences import write_taste

    for split, files in (("train", config.pairs.train), ("val", config.pairs.held_out)):
        if not Path(files[0]).exists():
            count = write_taste(*load_pictures(paths.DATA, split), Path(files[0]), seed=len(split))
            print(f"{count} pairs in {files[0]}", flush=True)


def main() -> None:
    """Fit, and say where the model is."""
    config = parse({"tiny": tiny, "image_reward": image_reward}, PreferenceConfig, __doc__)
    if "tiny" in sys.argv[1:2]:
        build_tiny(config)
    from hypersd_ray.trainer.preference import fit

    fitted = fit(config)
    m = fitted.metrics
    print(
        f"\npairwise accuracy {m['held_out_accuracy']:.3f} +- {m['held_out_error']:.3f} on {m['held_out_pairs']:.0f} held-out pairs"
        + (f", before {m['held_out_before']:.3f}" if "held_out_before" in m else "")
    )
    print(f"model    {fitted.model} (rewards: name image_reward, checkpoint {fitted.model})")
    print(f"logs     tensorboard --logdir {fitted.folder}/tensorboard")


if __name__ == "__main__":
    run_job(main)
