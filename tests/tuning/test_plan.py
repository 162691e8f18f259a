"""The plan's arithmetic, against figures made by hand."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest

from hypersd_ray.config.base import ConfigError
from hypersd_ray.models.checkpoint import read_base
from hypersd_ray.recipes import RECIPES
from hypersd_ray.tuning.plan import (
    Hardware,
    Work,
    all_reduce_seconds,
    limits,
    parse_hardware,
    plan,
    row,
    split_plan,
    work_of,
)

HARDWARE = Hardware(seconds_per_image=0.28, encoder_images_s=20)


def test_all_reduce_by_hand():
    """Full SDXL, 10.4 GB: ring of 8 at 235 GB/s, ring of 4 nodes at 45 GB/s, 5 doublings of 20 us there and back."""
    expected = 2 * 7 / 8 * 10.4 / 235 + 2 * 3 / 4 * 10.4 / 45 + 20e-6 * 2 * 5
    assert all_reduce_seconds(2_600_000_000, 32, HARDWARE) == pytest.approx(expected)
    assert all_reduce_seconds(2_600_000_000, 1, HARDWARE) == 0
    # within a node nothing goes between nodes
    assert all_reduce_seconds(67_000_000, 8, HARDWARE) == pytest.approx(2 * 7 / 8 * 0.268 / 235 + 20e-6 * 2 * 3)


def test_a_row_by_hand():
    work = Work(parameters=1000, checkpoint_bytes=5e9, row_bytes=449e3, batch=512, checkpoint_every=10)
    made = row(work, HARDWARE, 32)
    assert made.compute == pytest.approx(0.28 * 16)
    assert made.checkpoint == pytest.approx(0.5)
    assert made.images_s == pytest.approx(512 / made.step)
    assert made.encoders == math.ceil(made.images_s / 20) and made.rewards == 0
    assert made.read == pytest.approx(made.images_s * 449e3 / 1e9)
    assert made.limits == (
        "encoders",
        "checkpoints",
    )  # 5.1 GPUs beside 32 and half a second of five
    assert (
        limits([row(work, HARDWARE, w) for w in (1, 8, 32)])
        == "limits: encoders, from 1 GPUs; checkpoints, from 32 GPUs"
    )
    feedback, slow = replace(work, judged=2), replace(HARDWARE, reward_images_s=20)
    assert row(feedback, HARDWARE, 32).rewards == math.ceil(2 * made.images_s / 60)
    assert row(feedback, slow, 32).limits[0] == "reward actors" and "reward actors" not in row(work, slow, 32).limits
    # 300 workers and 512 images: some compute two, the others wait for them
    assert "batch too small" in row(work, HARDWARE, 300).limits


def test_a_lora_scales_further_than_the_whole_unet():
    lora, full = (Work(p, 0.0, 0.0, 512, 500) for p in (67_000_000, 2_600_000_000))
    rows = {w: (row(lora, HARDWARE, w), row(full, HARDWARE, w)) for w in (8, 256)}
    assert all(a.images_s > b.images_s for a, b in rows.values())
    assert rows[256][0].all_reduce < 0.05 * rows[256][0].step < rows[256][1].all_reduce


def test_the_tiny_recipes_plan():
    config = RECIPES["tiny"]()
    work = work_of(config, read_base(config.teacher))
    # The committed LoRA has 4.84 MB of float32, a checkpoint 19.4 MB (docs/cluster.md).
    assert 4 * work.parameters == pytest.approx(4.84e6, rel=0.01)
    assert work.checkpoint_bytes == pytest.approx(19.4e6, rel=0.02)
    # Float16: 4 x 8 x 8 latents of 32 pixels (its autoencoder halves twice), 77 tokens of 96 numbers.
    assert config.data.resolution == 32
    assert work.row_bytes == 2 * (4 * 8 * 8 + 77 * 96)
    text = plan(config, ["seconds_per_image=0.015"])
    assert text.count("\n| ") == 10 and "| 256 | " in text and "not measured" in text


@pytest.mark.parametrize(
    ("given", "said"),
    [("storgae=2", "unknown rate 'storgae'; there are data"), ("storage=fast", "must be a number above 0"),
     ("storage=0", "must be a number above 0"), ("gpus_per_node=0.5", "gpus_per_node must be a whole number of at least 1")],
)  # fmt: skip
def test_wrong_rates_are_one_line(given, said):
    with pytest.raises(ConfigError, match=said):
        parse_hardware([given])


def test_an_unknown_step_is_asked_for():
    with pytest.raises(ConfigError, match="give --plan seconds_per_image"):
        plan(RECIPES["tiny"]())


def test_the_jobs_print_it_and_train_nothing(monkeypatch, capsys):
    def said(name: str, *arguments: str) -> str:
        spec = importlib.util.spec_from_file_location(f"{name}_job", Path(__file__).parents[2] / "jobs" / f"{name}.py")
        job = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(job)
        monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments])
        job.main()
        return capsys.readouterr().out

    given = ["tiny", "--plan", "storage=2", "seconds_per_image=0.01", "--optim.batch", "64"]
    assert split_plan(given) == (["tiny", "--optim.batch", "64"], ["storage=2", "seconds_per_image=0.01"])
    tscd = said("tscd", "sd15", "--plan")  # no teacher's folder: its published shape
    assert "seconds_per_image=0.032" in tscd and "| 256 | " in tscd and "reward" not in tscd
    feedback = said("feedback", "sd15", "--plan")
    # SD1.5's LoRA and Adam's two moments; pictures from noise for the rewards, real ones noised for the structure
    assert "67.3M trained parameters: 269 MB of gradients a step, 807 MB a checkpoint" in feedback
    assert "limits: reward actors, from 1 GPUs" in feedback and "judge 2 pictures for each image" in feedback
    tiny = said("tscd", *given)
    assert "storage=2" in tiny and "| 256 | " in tiny and "limit" in tiny
