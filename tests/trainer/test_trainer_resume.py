"""Real Ray Train runs: whatever is killed, the LoRAs that come out are those of the unbroken run."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from hypersd_ray.trainer import run
from hypersd_ray.trainer.run import train
from tests.trainer.helpers import (
    driver,
    folder_of,
    is_paused,
    job,
    kill,
    metrics,
    paused,
    resumed_at,
    train_workers,
    wait_for,
)

pytestmark = pytest.mark.cluster

LORAS = [f"tscd-k{k}{layout}.safetensors" for k in (2, 1) for layout in ("", "-kohya")]


def loras(config) -> dict[str, dict[str, torch.Tensor]]:
    """name -> tensors of every LoRA file."""
    folder = folder_of(config) / "lora"
    assert sorted(p.name for p in folder.iterdir()) == sorted(LORAS)
    return {name: load_file(folder / name) for name in LORAS}


def assert_same(ours, theirs, tolerance: float = 0.0):
    assert ours.keys() == theirs.keys()
    for name, tensors in ours.items():
        assert tensors.keys() == theirs[name].keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, theirs[name][key], rtol=0, atol=tolerance, msg=f"{name} {key}")


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Runs that tests share."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def made() -> dict:
    """What the unbroken runs left, by number of workers."""
    return {}


@pytest.fixture
def unbroken(make_config, made, out):
    """unbroken(workers) -> (config, Result), run once."""

    def get(workers: int):
        if workers not in made:
            config = make_config(f"unbroken-{workers}", run={"out": str(out), "workers": workers})
            made[workers] = config, train(config)
        return made[workers]

    return get


def test_an_unbroken_run_leaves_all_its_products(cluster, unbroken, teacher):
    config, result = unbroken(1)
    folder = Path(result.folder)
    assert folder == folder_of(config)
    rows = metrics(config)
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert {row["k"] for row in rows} == {2, 1}
    assert {"loss", "consistency", "grad_norm", "images_per_s", "data_wait"} <= rows[-1].keys()
    assert "adversarial" in rows[-1] and "adversarial" not in rows[0]
    assert 0 <= result.metrics["data_wait_share"] < 0.5
    assert result.metrics["train_seconds"] > 0
    assert result.metrics["skipped"] == 0
    # the two newest checkpoints (the third, sixth, ... of a stage, and its end), named by their step
    assert sorted(p.name for p in folder.glob("checkpoint_0*")) == ["checkpoint_00000029", "checkpoint_00000030"]

    pipe = StableDiffusionPipeline.from_pretrained(teacher, safety_checker=None, requires_safety_checker=False)
    generate = lambda: pipe(
        "a drawn panda", num_inference_steps=1, guidance_scale=0, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    base = generate()
    for name, tensors in loras(config).items():
        assert all(torch.isfinite(t).all() for t in tensors.values())
        pipe.load_lora_weights(folder / "lora" / name)
        assert (generate() - base).abs().max() > 1e-4, f"{name} changes nothing"
        pipe.unload_lora_weights()


def test_the_logs_hold_scalars_and_sample_grids(cluster, unbroken):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, _ = unbroken(1)
    events = EventAccumulator(str(folder_of(config) / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 31))
    assert [e.step for e in events.Images("samples/teacher25_student8421")] == [20, 30]  # the end of each stage


def train_and_kill(config, marker: Path, monkeypatch):
    """Train until step 10, kill the last of its workers, let Ray start them again; -> (Result, all their ids)."""
    workers: list[int] = []

    def assassin():
        wait_for(lambda: is_paused(config, marker))
        workers.extend(train_workers())
        kill(workers[-1])

    monkeypatch.setattr(run, "train_loop", paused(marker))
    thread = threading.Thread(target=assassin)
    thread.start()
    result = train(config)
    thread.join()
    assert resumed_at(config) == [10], "once, from the checkpoint at step 9"
    return result, workers


def test_a_killed_worker_changes_nothing(cluster, make_config, unbroken, tmp_path, monkeypatch):
    config = make_config("worker-killed")
    result, workers = train_and_kill(config, tmp_path / "paused", monkeypatch)
    assert len(workers) == 1
    assert_same(loras(config), loras(unbroken(1)[0]))
    assert result.metrics["skipped"] == 0


def test_a_killed_driver_started_again_changes_nothing(cluster, make_config, unbroken, tmp_path):
    config = make_config("driver-killed")
    marker = tmp_path / "paused"
    first = driver(config, tmp_path / "config.yaml", marker, cluster)
    wait_for(lambda: is_paused(config, marker), process=first)
    kill(first.pid)
    first.communicate()
    assert not (folder_of(config) / "lora" / "tscd-k1.safetensors").exists()
    second = job(config, tmp_path / "config.yaml", cluster)
    said, complaints = second.communicate(timeout=550)
    assert second.returncode == 0, complaints
    assert resumed_at(config) == [10]
    assert_same(loras(config), loras(unbroken(1)[0]))
    # the last lines: where everything is
    for line in ("LoRA ", "picture ", "config ", "logs ", "Use it:"):
        assert line in said
    assert "load_lora_weights" in said
    assert {"grid.png", "curves.png", "config.yaml", "metrics.jsonl"} <= {p.name for p in folder_of(config).iterdir()}
    # and once more, with nothing left to do, which must be said
    before = len(metrics(config))
    assert train(config).was_finished
    assert len(metrics(config)) == before
    assert_same(loras(config), loras(unbroken(1)[0]))


def test_two_workers_stay_equal_and_resume(cluster, make_config, unbroken, monkeypatch, tmp_path):
    def dumping(arguments):
        """The loop, and each rank's own weights after it."""
        import torch

        from hypersd_ray.trainer import loop
        from tests.helpers.distil import snapshot

        inner = loop.Worker.run

        def outer(worker):
            inner(worker)
            torch.save(snapshot(worker.training), f"{folder}/rank-{worker.rank}.pt")

        loop.Worker.run = outer
        loop.train_loop(arguments)

    folder = str(tmp_path)
    monkeypatch.setattr(run, "train_loop", dumping)
    whole, _ = unbroken(2)
    ranks = [torch.load(f"{folder}/rank-{r}.pt", weights_only=True) for r in range(2)]
    assert ranks[0].keys() == ranks[1].keys()
    assert all(torch.equal(tensor, ranks[1][name]) for name, tensor in ranks[0].items())
    assert [row["step"] for row in metrics(whole)] == list(range(1, 31))

    config = make_config("two-workers-killed", run={"workers": 2})
    _, workers = train_and_kill(config, tmp_path / "paused", monkeypatch)
    assert len(workers) == 2
    assert_same(loras(config), loras(whole), tolerance=1e-5)
    # Other shares of the data: these are other weights than one worker's.
    with pytest.raises(AssertionError):
        assert_same(loras(config), loras(unbroken(1)[0]), tolerance=1e-5)
