"""Reward model training as a run under Ray, with relative paths as a user types them."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hypersd_ray.config.base import ConfigError, RunError, Stopped
from hypersd_ray.config.preference import PreferenceConfig, PreferencePairsConfig
from hypersd_ray.embedded import paths
from hypersd_ray.embedded.pictures import load_pictures
from hypersd_ray.embedded.preferences import write_taste
from hypersd_ray.embedded.pretrain_preference import new_image_reward
from hypersd_ray.models.rewards.image_reward import load_image_reward, save_image_reward
from hypersd_ray.trainer import preference
from hypersd_ray.trainer.preference import fit

pytestmark = pytest.mark.cluster


def test_a_fitted_model_is_loaded_as_a_reward_and_a_finished_run_trains_nothing(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, captions = load_pictures(paths.DATA, "val")
    count = write_taste(images[:64], captions[:64], tmp_path / "pairs.parquet")
    assert count > 20
    save_image_reward(new_image_reward(paths.TEACHER), tmp_path / "start")
    config = PreferenceConfig.model_validate(
        {
            "pairs": PreferencePairsConfig(train=("pairs.parquet",), held_out=("pairs.parquet",), resolution=32),
            "init": "start", "freeze": 0.0, "steps": 4, "optim": {"lr": 1e-3, "batch": 4}, "eval_every": 2,
            "run": {"name": "reward", "out": "runs", "checkpoint_every": 2, "log_every": 1},
        }
    )  # fmt: skip
    fitted = fit(config)
    assert fitted.metrics["held_out_pairs"] == count and 0 <= fitted.metrics["held_out_accuracy"] <= 1
    assert 0 <= fitted.metrics["held_out_before"] <= 1
    assert fitted.model == str(tmp_path / "runs" / "reward" / "model")
    before = load_file(tmp_path / "start" / "model.safetensors")
    after = load_file(tmp_path / "runs" / "reward" / "model" / "model.safetensors")
    assert before.keys() == after.keys() and any(not torch.equal(before[n], after[n]) for n in before)
    scores = load_image_reward(fitted.model)(images[:2].float() / 255, captions[:2])
    assert torch.isfinite(scores).all()

    again = fit(config)
    events = EventAccumulator(str(tmp_path / "runs" / "reward" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4], "a finished run hides nothing"
    assert again.metrics["held_out_accuracy"] == fitted.metrics["held_out_accuracy"]
    same = load_file(tmp_path / "runs" / "reward" / "model" / "model.safetensors")
    assert all(torch.equal(after[name], same[name]) for name in after)
    with pytest.raises(ConfigError, match="steps differs from the run"):
        fit(config.model_copy(update={"steps": 5}))
    with pytest.raises(ConfigError, match=r"init=.*gone does not exist"):
        fit(config.model_copy(update={"init": "gone"}))
    monkeypatch.setattr(preference, "connect", lambda: pytest.fail("the run asked for a cluster"))
    (tmp_path / "start" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read") as e:
        fit(config.model_copy(update={"run": config.run.model_copy(update={"name": "unreadable"})}))
    assert "\n" not in str(e.value)


def test_nan_and_too_few_cpus_are_one_line(cluster, tmp_path, monkeypatch):
    images, captions = load_pictures(paths.DATA, "val")
    write_taste(images[:32], captions[:32], tmp_path / "pairs.parquet")
    save_image_reward(new_image_reward(paths.TEACHER), tmp_path / "start")
    pairs = (str(tmp_path / "pairs.parquet"),)
    config = PreferenceConfig.model_validate(
        {
            "pairs": PreferencePairsConfig(train=pairs, held_out=pairs, resolution=32),
            "init": str(tmp_path / "start"), "freeze": 0.0, "steps": 9, "optim": {"lr": 1e30, "batch": 4},
            "run": {"name": "nan", "out": str(tmp_path / "runs"), "max_bad_steps": 2},
        }
    )  # fmt: skip
    with pytest.raises(RunError, match=r"2 steps in a row had NaN or inf \(run\.max_bad_steps=2\)"):
        fit(config)
    monkeypatch.delenv("RAY_AUTOSCALING", raising=False)
    many = config.run.model_copy(update={"cpus_per_worker": 99, "name": "many"})
    with pytest.raises(ConfigError, match=r"run\.workers=1 with run\.cpus_per_worker=99 need 99 CPU, the cluster has"):
        fit(config.model_copy(update={"run": many}))


def test_a_stopped_run_goes_on_from_its_last_step_past_a_damaged_checkpoint(cluster, tmp_path, capfd):
    images, captions = load_pictures(paths.DATA, "val")
    write_taste(images[:32], captions[:32], tmp_path / "pairs.parquet")
    save_image_reward(new_image_reward(paths.TEACHER), tmp_path / "start")
    pairs = (str(tmp_path / "pairs.parquet"),)
    run = {
        "name": "stopped",
        "out": str(tmp_path / "runs"),
        "checkpoint_every": 5,
        "keep_checkpoints": 3,
        "log_every": 10,
    }
    config = PreferenceConfig.model_validate(
        {
            "pairs": PreferencePairsConfig(train=pairs, held_out=pairs, resolution=32), "init": str(tmp_path / "start"),
            "freeze": 0.0, "steps": 60, "optim": {"lr": 1e-3, "batch": 4}, "eval_every": 30, "run": run,
        }
    )  # fmt: skip
    folder = tmp_path / "runs" / "stopped"

    def stop_after_the_first_checkpoint() -> None:
        while len(list(folder.glob("checkpoint_*/manifest.json"))) < 1:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_after_the_first_checkpoint, daemon=True).start()
    with pytest.raises(
        Stopped, match=r"run stopped was told to stop; the same command goes on from .*checkpoint_"
    ) as stop:
        fit(config)
    newest = folder / str(stop.value).rsplit("/", 1)[1]
    assert 8 < int(newest.name.removeprefix("checkpoint_")) < 60
    assert not (folder / "model").exists()
    (newest / "model.safetensors").write_bytes(b"torn")
    found = fit(config)
    assert f"{newest} is damaged, going on from the one before" in capfd.readouterr().out
    unbroken = fit(config.model_copy(update={"run": config.run.model_copy(update={"name": "unbroken"})}))
    ends = [load_file(f"{fitted.model}/model.safetensors") for fitted in (found, unbroken)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1]), "bitwise"
    assert found.metrics["held_out_before"] == unbroken.metrics["held_out_before"]
