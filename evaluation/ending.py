"""What a training job says and draws when its run is over."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from evaluation.pictures import draw_curves, draw_grid
from hypersd_ray.trainer import storage
from hypersd_ray.trainer.run import Result


def say_how_it_went(name: str, result: Result) -> None:
    """The run's `name`, whether it was over before, steps skipped and time waited."""
    if result.was_finished:
        print(f"\nRun {name} was finished before, nothing was trained: set run.name to start another")
    skipped, waited = result.metrics.get("skipped", 0), result.metrics.get("data_wait_share", 0)
    print(f"\nRun {name}: {skipped} steps skipped, trainer waited for data {waited:.2%} of the time")


def say_where_it_is(result: Result) -> None:
    """What was wrong with the data; the configuration and the logs."""
    if result.rejected:
        print(f"data     {result.rejected}")
    print(f"config   {result.folder}/config.yaml")
    print(f"logs     tensorboard --logdir {result.folder}/tensorboard")


def draw(folder: str, rows: dict[str, torch.Tensor], prompts: Sequence[str], title: str) -> list[str]:
    """Loss curves, and the grid of `rows` where there are any (see `draw_grid`), written into the run's folder (any fsspec
    URL); returns their paths."""
    names = ["grid.png", "curves.png"] if rows else ["curves.png"]
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary)
        (made / "metrics.jsonl").write_text(storage.read_text(f"{folder}/metrics.jsonl"))
        draw_curves(made / "metrics.jsonl", made / "curves.png")
        if rows:
            draw_grid(rows, prompts, made / "grid.png", title)
        for name in names:
            storage.put(made / name, f"{folder}/{name}")
    return [f"{folder}/{name}" for name in names]
