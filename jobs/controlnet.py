"""Train a small ControlNet on the embedded world's edges, for trials of LoRAs beside one (paper, Fig. 10).

    python jobs/controlnet.py --kind canny --out runs/controlnet        # minutes on a CPU
    python evaluation/control.py --controlnet runs/controlnet/canny

Stopped and started again, it goes on. The result, OUT/KIND, is a folder in diffusers' layout; `model.controlnets` of the
endpoint takes it too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

from pydantic import Field

from hypersd_ray.config.base import Strict
from hypersd_ray.config.cli import read_options, run_job
from hypersd_ray.embedded import paths


class ControlNetConfig(Strict):
    """What to train on what."""

    kind: Literal["canny", "scribble"] = "canny"
    """Thin edges, or thick strokes."""
    data: Path = paths.DATA
    """Folder with train-*.tar of the embedded world."""
    teacher: Path = paths.TEACHER
    """Folder of the base model, frozen."""
    out: Path = Path("runs/controlnet")
    """Folder for the state and the finished model."""
    steps: int = Field(default=2000, ge=1)
    """Batches of 32."""
    seed: int = 0
    """All randomness is a function of (seed, step)."""


def main() -> None:
    """Train it, say where it is."""
    config: ControlNetConfig = read_options(ControlNetConfig, sys.argv[1:], __doc__ or "")
    from hypersd_ray.embedded.pictures import load_pictures
    from hypersd_ray.embedded.pretrain_controlnet import train_controlnet

    images, captions = load_pictures(config.data, "train")
    train_controlnet(config.teacher, images, captions, config.kind, config.out, config.steps, seed=config.seed)
    print(f"ControlNet  {config.out / config.kind}")


if __name__ == "__main__":
    run_job(main)
