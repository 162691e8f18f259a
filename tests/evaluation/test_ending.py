"""What a training job says and draws at its end."""

from __future__ import annotations

import json

import torch
from PIL import Image

from evaluation import ending
from hypersd_ray.trainer.run import Result


def test_curves_are_drawn_of_every_run_and_a_grid_where_there_are_pictures(tmp_path):
    lines = [json.dumps({"step": step, "consistency": 1 / (step + 1), "k": 8 - step // 2}) for step in range(4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    curves, grid = f"{tmp_path}/curves.png", f"{tmp_path}/grid.png"
    assert ending.draw(str(tmp_path), {}, ["a cat"], "") == [curves]
    rows = {"teacher 4": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}
    assert ending.draw(str(tmp_path), rows, ["a cat"], "same noise") == [grid, curves]
    assert all(min(Image.open(path).size) > 50 for path in (grid, curves))


def test_what_is_said_of_a_run(capsys):
    result = Result("runs/a", {"skipped": 2, "data_wait_share": 0.125}, was_finished=True, rejected="3 of 9 rejected")
    ending.say_how_it_went("a", result)
    ending.say_where_it_is(result)
    assert capsys.readouterr().out.split("\n") == [
        "", "Run a was finished before, nothing was trained: set run.name to start another",
        "", "Run a: 2 steps skipped, trainer waited for data 12.50% of the time",
        "data     3 of 9 rejected", "config   runs/a/config.yaml", "logs     tensorboard --logdir runs/a/tensorboard", "",
    ]  # fmt: skip
