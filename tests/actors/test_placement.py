"""Actors that cannot be placed: the settings are called as the run's kind calls them. No Ray."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import GetTimeoutError

from hypersd_ray.actors import placement
from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.rewards import PlacementConfig

SECTION = "feedback.placement"


@pytest.fixture(autouse=True)
def one_node(monkeypatch):
    """Of two CPUs, all of them taken, where no call is ever answered."""

    def never(*_, **__):
        raise GetTimeoutError

    monkeypatch.delenv("RAY_AUTOSCALING", raising=False)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "a", "Alive": True, "Resources": {"CPU": 2.0}}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "available_resources", dict)
    monkeypatch.setattr(placement, "available_resources_per_node", dict)
    monkeypatch.setattr(ray, "wait", lambda refs, **_: ([], refs))
    monkeypatch.setattr(ray, "get", never)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"num_gpus": 0.5}, ("num_gpus", "where=local")), ({"label_selector": {"pool": "x"}}, ("label_selector", "where=local"))],
)  # fmt: skip
@pytest.mark.parametrize("section", ["placement", SECTION])
def test_a_node_that_is_nowhere(settings, named, section):
    with pytest.raises(ConfigError) as error:
        placement.start_evaluators([], PlacementConfig(**settings), "run", section)
    assert_called(error, named, section)


@pytest.mark.parametrize(
    ("wait", "named"),
    [
        (placement._await_places, ("label_selector", "num_gpus", "num_cpus", "where=local", "place_timeout_s")),
        (placement._await_models, ("load_timeout_s",)),
    ],
)
@pytest.mark.parametrize("section", ["placement", SECTION])
def test_a_place_that_is_not_free_and_a_model_that_loads_for_ever(wait, named, section):
    call = SimpleNamespace(remote=lambda: "reference")
    handles = {"clip_score": [SimpleNamespace(ping=call, load=call)]}
    with pytest.raises(ConfigError) as error:
        wait(handles, PlacementConfig(num_cpus=1, label_selector={"pool": "x"}), section)
    assert_called(error, named, section)


def assert_called(error, named, section):
    said = str(error.value)
    assert all(f" {section}.{name}" in said.replace("(", " ") for name in named), said
    assert said.count("placement.") == said.count(f"{section}."), said
