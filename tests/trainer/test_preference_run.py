"""Reward model training as a run under Ray, with relative paths as a user types them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.preference import PairsConfig, PreferenceConfig
from hypersd_ray.embedded import paths
from hypersd_ray.embedded.pictures import load_pictures
from hypersd_ray.embedded.preferences import write_pairs, write_start
from hypersd_ray.models.rewards.image_reward import load_image_reward
from hypersd_ray.trainer.preference import fit

pytestmark = pytest.mark.cluster


def test_a_fitted_model_is_loaded_as_a_reward_and_a_finished_run_trains_nothing(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, captions = load_pictures(paths.DATA, "val")
    count = write_pairs(images[:64], captions[:64], paths.TEACHER, tmp_path / "pairs.parquet")
    assert count > 20
    write_start(paths.TEACHER, tmp_path / "start")
    config = PreferenceConfig.model_validate(
        {
            "pairs": PairsConfig(train=("pairs.parquet",), held_out=("pairs.parquet",), resolution=32),
            "init": "start", "freeze": 0.0, "steps": 4, "optim": {"lr": 1e-3, "batch": 4}, "eval_every": 2,
            "run": {"name": "reward", "out": "runs", "checkpoint_every": 2, "log_every": 1},
        }
    )  # fmt: skip
    fitted = fit(config)
    assert fitted.metrics["held_out_pairs"] == count and 0 <= fitted.metrics["held_out_accuracy"] <= 1
    assert fitted.model == str(tmp_path / "runs" / "reward" / "model")
    before = load_file(tmp_path / "start" / "model.safetensors")
    after = load_file(tmp_path / "runs" / "reward" / "model" / "model.safetensors")
    assert before.keys() == after.keys() and any(not torch.equal(before[n], after[n]) for n in before)
    scores = load_image_reward(fitted.model)(images[:2].float() / 255, captions[:2])
    assert torch.isfinite(scores).all()

    again = fit(config)
    assert again.metrics["held_out_accuracy"] == fitted.metrics["held_out_accuracy"]
    same = load_file(tmp_path / "runs" / "reward" / "model" / "model.safetensors")
    assert all(torch.equal(after[name], same[name]) for name in after)
    with pytest.raises(ConfigError, match="steps differs from the run"):
        fit(config.model_copy(update={"steps": 5}))
    with pytest.raises(ConfigError, match=r"init=.*gone does not exist"):
        fit(config.model_copy(update={"init": "gone"}))
