"""The plan held against processes of this machine."""

from __future__ import annotations

import pytest

from evaluation import scaling
from evaluation.scaling import ScalingConfig
from hypersd_ray.tuning.plan import Hardware


@pytest.fixture(scope="module")
def found():
    config = ScalingConfig(workers=(2,), parameters=640_000, seconds_per_image=0.02, batch=4, steps=4, rounds=1)
    return scaling.measure(config)


def test_waits_are_shared_out_and_the_rest_is_measured(found):
    two = found["rows"]["2"]["measured"][0]
    assert 0.04 <= two["compute"] < 0.1  # 2 of 4 images of 0.02 s
    assert two["all_reduce"] > 0 and two["checkpoint"] > 0


def test_what_is_planned_rests_on_the_probes(found):
    planned, hardware = found["rows"]["2"]["planned"], found["hardware"]
    assert planned["compute"] == pytest.approx(0.04)
    assert planned["all_reduce"] == pytest.approx(4 * 640_000 / (hardware["gpu_link"] * 1e9), rel=0.05, abs=1e-4)
    assert planned["checkpoint"] == pytest.approx(16 * 640_000 / (hardware["storage"] * 1e9) / 4)


def test_workers_of_one_machine_share_its_memory():
    config = ScalingConfig()
    plans = {
        world: scaling._plans(
            config, Hardware(gpu_link=6.0, seconds_per_image=0.1, encoder_images_s=1.0, reward_images_s=1.0), world
        )
        for world in (1, 2, 4)
    }
    slower = [plans[world]["shared"]["all_reduce"] / (plans[world]["planned"]["all_reduce"] or 1) for world in plans]
    assert slower == pytest.approx([0, 1, 2], rel=0.01)


def test_the_table_has_both(found):
    lines = scaling.table(found).splitlines()
    assert (
        lines[0].startswith("1M parameters; probes: all-reduce ") and lines[-1].startswith("| 2 | ") and len(lines) == 5
    )
    measured = found["rows"]["2"]["measured"][0]
    assert f"/ {measured['all_reduce']:.3f}" in lines[-1]
