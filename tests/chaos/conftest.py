"""The trainer tests' Ray, micro pipeline and latents; unbroken runs to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.trainer import run
from tests.chaos.faults import Story, broken, story
from tests.trainer.conftest import cluster, latents, make_config, shards, teacher
from tests.trainer.helpers import folder_of

__all__ = ["cluster", "latents", "make_config", "shards", "teacher"]

STAGES = {"k_list": (2, 1), "n_list": (8, 8), "steps_list": (12, 6)}
STEPS, BATCH, EVERY = 18, 4, 3


@pytest.fixture
def make(make_config) -> Callable[..., TSCDConfig]:
    """make(name, ...): 18 steps of 4 in two stages, a checkpoint every 3."""

    def build(name: str, shards: Path | None = None, **changes) -> TSCDConfig:
        changes["run"] = {"max_failures": 10} | changes.get("run", {})
        changes["distill"] = STAGES | changes.get("distill", {})
        return make_config(name, shards=shards, **changes)

    return build


@pytest.fixture
def train_broken(monkeypatch, tmp_path):
    """train_broken(config, faults, rank) -> the run's story; raises what `train` raises."""

    def go(config: TSCDConfig, at: dict | None = None, rank: int = 0) -> Story:
        trace = tmp_path / f"{config.run.name}.trace"
        monkeypatch.setattr(run, "train_loop", broken(trace, at or {}, rank))
        result = run.train(config)
        assert result.metrics["stage"] == 2 and result.metrics["skipped"] == 0
        return story(trace)

    return go


@pytest.fixture(scope="package")
def kept() -> dict:
    """What unbroken runs left."""
    return {}


@pytest.fixture
def unbroken(make, train_broken, kept):
    """unbroken(workers) -> (LoRAs, story), run once."""

    def get(workers: int = 1):
        if workers not in kept:
            config = make(f"unbroken-{workers}", run={"workers": workers})
            told = train_broken(config)
            kept[workers] = products(config), told
        return kept[workers]

    return get


def products(config: TSCDConfig) -> dict:
    """name -> tensors of the LoRAs in diffusers' layout."""
    return {k: load_file(folder_of(config) / "lora" / f"tscd-k{k}.safetensors") for k in (2, 1)}


@pytest.fixture
def assert_unchanged(unbroken):
    """assert_unchanged(config, story): the unbroken run's weights to the last bit, and its samples, each step's once."""

    def check(config: TSCDConfig, told: Story, workers: int = 1) -> None:
        whole, reference = unbroken(workers)
        assert told.keys == reference.keys
        assert sum(map(len, told.keys.values())) == STEPS * BATCH
        for k, tensors in products(config).items():
            assert tensors.keys() == whole[k].keys()
            assert all(bool((t == whole[k][n]).all()) for n, t in tensors.items()), f"k = {k}"

    return check
