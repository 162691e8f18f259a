"""What counts as a step's time when Ray's cost is measured."""

from __future__ import annotations

import time

import pytest

from evaluation.overhead import OverheadConfig, median_interval, run_config, seconds_a_step
from hypersd_ray.embedded import paths
from hypersd_ray.trainer.logs import Loggers


def test_all_that_lies_between_two_logged_steps_is_in_their_time(tmp_path):
    config = run_config(OverheadConfig(), tmp_path, "run", str(paths.DATA))
    loggers = Loggers(config)
    loggers.scalars(10, {"loss": 1.0})
    time.sleep(0.3)  # a report, say
    loggers.scalars(20, {"loss": 1.0})
    time.sleep(0.3)
    loggers.scalars(30, {"loss": 1.0})
    loggers.close()
    assert seconds_a_step(config) == pytest.approx(0.6 / 20, rel=0.5)


def test_the_medians_interval():
    middle, low, high = median_interval([0.9, 1.0, 1.01, 1.02, 1.02, 1.03, 1.04, 1.04, 1.05, 3.0])
    assert middle == pytest.approx(1.025) and 0.99 < low < middle < high < 1.06, "one round of ten is no matter"
    assert median_interval([1.02, 1.02]) == (1.02, 1.02, 1.02)
