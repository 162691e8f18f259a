"""Feedback learning as a run under Ray: its products, and a shared reward actor that is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import ray
import torch
from safetensors.torch import load_file

from hypersd_ray.config.data import DataConfig
from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.config.rewards import PerceptionConfig
from hypersd_ray.models.checkpoint import load_unet, read_base
from hypersd_ray.models.export import merge_lora, save_diffusers_lora
from hypersd_ray.models.lora import Adapters
from hypersd_ray.models.lora_file import GUIDANCE, KEPT, TIMESTEP, LoRAMetadata, read_lora
from hypersd_ray.trainer import run
from tests.actors.conftest import clip_folder, models, pictures
from tests.chaos.clusters import alive_actors
from tests.chaos.faults import record
from tests.helpers.pipelines import micro_unet, randomize
from tests.trainer.helpers import ROOT, metrics, wait_for, write_config

__all__ = ["clip_folder", "models", "pictures"]

METADATA = LoRAMetadata(
    base_model="micro",
    family="sd",
    k=1,
    steps=(1, 2, 4, 8),
    scheduler="TCDScheduler",
    eta=0.0,
    rank=4,
    alpha=8.0,
    extra={GUIDANCE: KEPT},
)
STEPS = 12


@pytest.fixture(scope="module")
def tscd(tmp_path_factory):
    adapters = Adapters(micro_unet(), 4, 8.0)
    adapters.add("student", trainable=False)
    tensors = randomize(adapters, "student", size=0.02)
    return save_diffusers_lora(tensors, tmp_path_factory.mktemp("lora") / "tscd.safetensors", METADATA)


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    """A rectangle in each picture of the shards."""
    keys = [f"{s}-{i}" for s in range(3) for i in range(8)]
    path = tmp_path_factory.mktemp("coco") / "instances.json"
    path.write_text(json.dumps({
        "images": [{"id": n, "file_name": f"{key}.png", "width": 64, "height": 64} for n, key in enumerate(keys)],
        "categories": [{"id": 7, "name": "thing"}, {"id": 9, "name": "other"}],
        "annotations": [
            {"id": n + 1, "image_id": n, "category_id": 9, "iscrowd": 0, "area": 1024, "bbox": [8, 8, 32, 32],
             "segmentation": [[8, 8, 40, 8, 40, 40, 8, 40]]}
            for n in range(len(keys))
        ],
    }))  # fmt: skip
    return path


@pytest.fixture
def make(cluster, teacher, latents, tscd, annotations, models, tmp_path):
    """make(name, **changes): 12 steps on 4 pictures, two rewards (one held out) and SOLO."""
    aesthetic, clip_score, solo = models

    def make(name: str, **changes) -> FeedbackConfig:
        values = {
            "teacher": str(teacher), "tscd": str(tscd), "steps": STEPS,
            "data": DataConfig(shards=str(latents), resolution=64, shards_per_window=1, shuffle_rows=5),
            "rewards": (aesthetic, clip_score.model_copy(update={"role": "watch"})),
            "structure": {"model": solo.model_dump(), "annotations": str(annotations)},
            "watch": {"every": 2}, "lora": {"rank": 4}, "optim": {"lr": 1e-3, "batch": 4},
            "run": {"name": name, "out": str(tmp_path), "checkpoint_every": 5, "log_every": 1, "prompts": ("a cat",)},
        }  # fmt: skip
        return FeedbackConfig.model_validate(values | changes)

    return make


def products(config) -> dict[str, dict[str, torch.Tensor]]:
    folder = f"{config.run.out}/{config.run.name}/lora"
    return {name: load_file(f"{folder}/{name}.safetensors") for name in ("feedback", "feedback-merged")}


@pytest.mark.cluster
def test_a_run_and_its_products(make, tscd, teacher, kept):
    whole = make("whole")
    result = run.train(whole)
    assert result.metrics["stage"] == 1 and result.metrics["skipped"] == 0
    rows = metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    named = {"aes", "percep", "drift", "reward/aesthetic_v2", "watch/clip_score", "saturation", "diversity", "hacking"}
    assert named <= rows[-1].keys() and all(row["percep"] > 0 for row in rows)
    assert "k" not in rows[-1]

    # the merge is the TSCD LoRA and the feedback LoRA together
    info, made = read_base(teacher), products(whole)
    merged, both = (load_unet(info, torch.float32, "cpu") for _ in range(2))
    folder = f"{whole.run.out}/{whole.run.name}/lora"
    feedback, alone = read_lora(f"{folder}/feedback.safetensors")
    tensors, together = read_lora(f"{folder}/feedback-merged.safetensors")
    assert alone.extra[GUIDANCE] == together.extra[GUIDANCE] == KEPT and "merged" in together.extra
    assert (alone.rank, together.rank, together.steps, together.k) == (4, 8, (1, 2, 4, 8), 1)
    assert any(t.abs().max() > 0 for name, t in feedback.items() if name.endswith("lora_B.weight"))
    merge_lora(merged, tensors, together.alpha)
    merge_lora(both, read_lora(tscd)[0], 8.0)
    merge_lora(both, feedback, alone.alpha)
    for name, tensor in both.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    kept |= made


@pytest.fixture(scope="module")
def kept() -> dict:
    """What an unbroken run made."""
    return {}


@pytest.mark.cluster
@pytest.mark.chaos
def test_a_run_whose_reward_actor_is_killed(make, kept):
    """The same weights to the last bit, each step once: calls are pure functions of their inputs."""
    if not kept:
        run.train(make("whole"))
        kept |= products(make("whole"))
    killed = make("killed")
    seen: list[int] = []
    took: list[float] = []

    def assassin():
        wait_for(lambda: len(metrics(killed)) >= 3)
        actor = ray.get_actor("killed/aesthetic_v2/0")
        seen.append(ray.get(actor.counts.remote())["pid"])
        os.kill(seen[0], signal.SIGKILL)
        seen.append(len(metrics(killed)))
        begun = time.monotonic()
        wait_for(lambda: len(metrics(killed)) > seen[1] + 1)  # the step at hand may have had its answer
        took.append(time.monotonic() - begun)

    thread = threading.Thread(target=assassin)
    thread.start()
    again = run.train(killed)
    thread.join()
    assert seen[1] < STEPS, "killed on the way"
    assert [row["step"] for row in metrics(killed)] == list(range(1, STEPS + 1)), "no step lost, none counted twice"
    assert again.metrics["skipped"] == 0
    for name, tensors in products(killed).items():
        assert all(torch.equal(tensor, kept[name][key]) for key, tensor in tensors.items())
    with pytest.raises(ValueError):
        ray.get_actor("killed/aesthetic_v2/0")  # the run leaves no actor behind
    record("reward actor SIGKILLed", "started again by Ray, no step made twice, same weights", None, took[0])


DRIVE = """
import yaml
from pathlib import Path
from hypersd_ray.config.cli import run_job
from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.trainer import run
run_job(lambda: run.train(FeedbackConfig.model_validate(yaml.safe_load(Path({file!r}).read_text()))) and 0)
"""


@pytest.mark.cluster
@pytest.mark.chaos
def test_a_stopped_job_leaves_no_reward_actor(make, cluster, tmp_path):
    config = make("stopped", steps=500)
    write_config(config, tmp_path / "config.yaml")
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVE.format(file=str(tmp_path / "config.yaml"))],
        env=cluster, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(lambda: len(metrics(config)) >= 3, process=process)
    assert alive_actors("EvaluatorActor") == 3
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    took = time.monotonic() - begun
    assert process.returncode == 1 and "error: run stopped was told to stop" in said and "Traceback" not in said, said
    wait_for(lambda: alive_actors("EvaluatorActor") == 0, 30)
    record("feedback job told to stop (SIGTERM)", "checkpoint of the last step, no reward actor left", None, took)


def test_what_cannot_work_is_one_line_before_ray(make, tmp_path, monkeypatch):
    def connect():
        raise AssertionError("the run asked for a cluster")

    monkeypatch.setattr(run, "connect", connect)
    config = make("refused")
    gone, apart = (
        config.rewards[0].model_copy(update=update)
        for update in ({"checkpoint": "/nowhere/head.pth"}, {"python": "/nowhere/python"})
    )
    for changes, said in (
        ({"rewards": (gone,)}, r"rewards\.aesthetic_v2\.checkpoint=/nowhere/head\.pth does not exist"),
        ({"rewards": (apart,)}, r"rewards\.aesthetic_v2\.python=/nowhere/python is no interpreter"),
        ({"structure": {"model": PerceptionConfig(checkpoint="/nowhere/solo")}}, r"structure\.model\.checkpoint=/nowhere"),
        ({"structure": config.structure.model_copy(update={"annotations": config.tscd})}, "is not a COCO instances file"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said) as caught:
            run.train(make("refused", **changes))
        assert "\n" not in str(caught.value)
    adapters = Adapters(micro_unet(), 4, 4.0)
    adapters.add("student", trainable=False)
    other = LoRAMetadata("other", "sdxl", 1, (1,), "TCDScheduler", 0.0, 4, 4.0)
    path = save_diffusers_lora(randomize(adapters, "student"), tmp_path / "xl.safetensors", other)
    with pytest.raises(ValueError, match=r"tscd=.*xl\.safetensors is a LoRA for sdxl"):
        run.train(make("refused", tscd=str(path)))
    single = replace(METADATA, extra={TIMESTEP: "800"})
    path = save_diffusers_lora(randomize(adapters, "student"), tmp_path / "t800.safetensors", single)
    with pytest.raises(
        ValueError, match=r"tscd=.*was made for the time step 800 alone, this run asks it at 999, 749, 499, 249:"
    ):
        run.train(make("refused", tscd=str(path)))
