"""How a run ends when it cannot go on, and the other kind of student."""

from __future__ import annotations

import fcntl
import shutil
import time
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import UNet2DConditionModel
from ray.data.extensions import ArrowTensorArray

from hypersd_ray.config.base import ConfigError
from hypersd_ray.data.plan import shard_order
from hypersd_ray.data.sources import find_shards
from hypersd_ray.trainer import sole
from hypersd_ray.trainer.checks import check
from hypersd_ray.trainer.run import train
from tests.trainer.helpers import folder_of, job, metrics, write_config

pytestmark = pytest.mark.cluster

ONE_STAGE = {"k_list": (1,), "n_list": (8,), "steps_list": (12,)}


def poison(latents: Path, folder: Path, seed: int) -> list[str]:
    """A copy of `latents` in which the shard that `seed` reads last holds NaN; returns its shards in reading order."""
    shutil.copytree(latents, folder)
    order = shard_order(find_shards((str(folder),)).urls, seed, 0)
    table = pq.read_table(order[-1])
    bad = np.full((len(table), 4, 8, 8), np.nan, dtype=np.float16)
    column = table.schema.get_field_index("latents")
    pq.write_table(table.set_column(column, "latents", ArrowTensorArray.from_numpy(bad)), order[-1])
    return order


def test_a_run_of_nan_stops_and_names_the_last_good_checkpoint(cluster, make_config, latents, tmp_path):
    """Two shards are four good steps of four images; then the third is NaN throughout."""
    poison(latents, tmp_path / "latents", seed=0)
    config = make_config(
        "nan", shards=tmp_path / "latents", distill=ONE_STAGE,
        run={"max_bad_steps": 2, "checkpoint_every": 2},
    )  # fmt: skip
    process = job(config, tmp_path / "config.yaml", cluster)
    _, complaints = process.communicate(timeout=500)
    assert process.returncode == 1
    assert "Traceback" not in complaints
    last = complaints.strip().splitlines()[-1]
    good = folder_of(config) / "checkpoint_00000004"
    assert last.startswith("error: 2 steps in a row had NaN or inf (run.max_bad_steps=2), the last at stage 1 step 6;")
    assert f"the last good checkpoint is {good}: lower optim.lr" in last
    assert (good / "manifest.json").exists()
    rows = metrics(config)
    # Once, not once for each of run.max_failures; and a NaN is null in JSON.
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["skipped"] for row in rows] == [0, 0, 0, 0, 1]
    assert rows[4]["loss"] is None and rows[3]["loss"] > 0


def test_another_configuration_under_the_same_name_is_refused(make_config, cluster, tmp_path):
    config = make_config("taken", distill=ONE_STAGE)
    folder = folder_of(config)
    folder.mkdir(parents=True)
    write_config(config, folder / "config.yaml")
    check(config)
    for change, said in (
        (
            {"distill": ONE_STAGE | {"omega_max": 6}},
            r"distill differs from the run that is in .*: omega_max is 6.0, there 7.0; set run.name",
        ),
        ({"lora": {"rank": 8}}, "lora differs .*: rank is 8, there 4; "),
        ({"run": {"seed": 1}}, "run.seed differs .*: it is 1, there 0; "),
        ({"full_unet": True}, "full_unet differs "),
    ):
        changed = make_config("taken", **({"distill": ONE_STAGE} | change))
        with pytest.raises(ConfigError, match=said) as caught:
            check(changed)
        assert "\n" not in str(caught.value)
    # What may change: where and how fast it runs.
    check(make_config("taken", distill=ONE_STAGE, optim={"lr": 1e-4}, run={"max_failures": 0, "workers": 2}))
    changed = make_config("taken", distill=ONE_STAGE | {"ema_decay": 0.5})
    process = job(changed, tmp_path / "other.yaml", cluster | {"RAY_ADDRESS": "127.0.0.1:1"})  # no Ray is reached
    said, complaints = process.communicate(timeout=300)
    assert (process.returncode, said) == (2, "")
    assert complaints.startswith("error: distill differs from the run that is in ")
    assert complaints.count("\n") == 1
    for text, said in (("teacher: [", "cannot be read"), ("teacher: 3\n", "holds another kind of run")):
        (folder / "config.yaml").write_text(text)
        with pytest.raises(ConfigError, match=said) as caught:
            check(config)
        assert "\n" not in str(caught.value)


def test_a_second_job_of_the_same_run_waits_for_the_first_and_is_refused(cluster, make_config, monkeypatch, capsys):
    config = make_config("twice", distill=ONE_STAGE)
    monkeypatch.setattr(sole, "LEAVING_S", 1.5)
    folder = folder_of(config)
    folder.mkdir(parents=True)
    said = r"run\.name=twice: another job trains the run in .*twice: stop it, or set run"
    with sole.sole(config.run, str(folder)), pytest.raises(ConfigError, match=said) as e:  # of this cluster
        train(config)
    assert "\n" not in str(e.value)
    with (folder / ".lock").open("ab") as file:  # of another, which has the folder alone in common
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=said):
            train(config)
    assert not (folder / "config.yaml").exists()
    assert capsys.readouterr().out.count("another job trains the run in") == 2, "once each"
    assert train(config).metrics["stage"] == 1, "over"


def test_a_damaged_checkpoint_ends_in_one_line_and_is_not_retried(cluster, make_config, tmp_path):
    """A user's mistake in a worker is told as one in the driver is: one line, and Ray does not try it again."""
    config = make_config("damaged", distill=ONE_STAGE | {"steps_list": (4,)}, run={"checkpoint_every": 4})
    train(config)
    weights = folder_of(config) / "checkpoint_00000004" / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    process = job(config, tmp_path / "config.yaml", cluster)
    _, complaints = process.communicate(timeout=500)
    assert process.returncode == 1
    assert "Traceback" not in complaints
    last = complaints.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "student.safetensors has " in last and "it is truncated" in last


def test_a_full_copy_trains_from_raw_shards_through_the_same_loop(cluster, make_config, shards, teacher):
    """No LoRA, and the encoders stream while it trains."""
    config = make_config("full", shards=shards, full_unet=True, distill=ONE_STAGE | {"steps_list": (8,)},
                         optim={"lr": 1e-5}, run={"checkpoint_every": 8})  # fmt: skip
    result = train(config)
    folder = folder_of(config)
    assert [row["step"] for row in metrics(config)] == list(range(1, 9))
    assert 0 <= result.metrics["data_wait_share"] <= 1
    assert not (folder / "lora").exists()
    student = UNet2DConditionModel.from_pretrained(folder / "unet-k1")
    base = UNet2DConditionModel.from_pretrained(teacher / "unet")
    differences = [(a - b).abs().max() for a, b in zip(student.parameters(), base.parameters(), strict=True)]
    assert all(torch.isfinite(d) for d in differences)
    assert 1e-6 < max(differences) < 1e-3  # 8 steps of 1e-5 at most


def test_prometheus_sees_the_gauges(cluster):
    """Scraped from Ray's metrics agent, as Prometheus does."""
    import ray

    from hypersd_ray.trainer.logs import Prometheus

    node = next(n for n in ray.nodes() if n["Alive"])
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    gauges = Prometheus("a-run")
    gauges.scalars(3, {"loss": 0.25, "images_per_s": 17.0, "skipped": 2, "grad_norm": 1.0})
    expected = {"loss": 0.25, "images_per_s": 17.0, "skipped": 2.0, "grad_norm": 1.0, "step": 3.0}
    until, lines = time.monotonic() + 300, {}
    while time.monotonic() < until and len(lines) < len(expected):
        time.sleep(1)
        try:
            text = urllib.request.urlopen(address, timeout=10).read().decode()
        except OSError:
            continue
        found = [line for line in text.splitlines() if line.startswith("ray_hypersd") and 'run="a-run"' in line]
        lines = {line.split("{")[0].removeprefix("ray_"): float(line.split()[-1]) for line in found}
    assert lines == {f"hypersd_{name}": value for name, value in expected.items()}
    gauges.close()
