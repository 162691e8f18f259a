"""The sample grid that a run ends with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.pictures import draw_grid


@pytest.mark.parametrize("columns", [1, 4])
def test_no_name_is_cut_off(tmp_path, columns):
    rows = {
        f"{who} {steps}": torch.zeros(columns, 3, 8, 8, dtype=torch.uint8)
        for who in ("teacher", "student")
        for steps in (1, 8)
    }
    draw_grid(
        rows, ["a noto pizza on a blue background"] * columns, tmp_path / "grid.png", "same noise, student after k = 1"
    )
    ink = np.asarray(Image.open(tmp_path / "grid.png").convert("L")) < 255
    assert not ink[0].any() and not ink[-1].any() and not ink[:, 0].any() and not ink[:, -1].any()
    assert ink.sum() > 1000
