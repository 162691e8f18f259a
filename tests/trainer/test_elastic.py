"""How many workers have room on nodes, and how long Ray Train waits for their places. That the number follows: tests/chaos."""

from __future__ import annotations

import os

import pytest

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.rewards import PlacementConfig
from hypersd_ray.embedded import paths
from hypersd_ray.recipes import FEEDBACK_RECIPES, ONESTEP_RECIPES, RECIPES
from hypersd_ray.trainer import checks, elastic


def with_run(**changes):
    config = RECIPES["tiny"]()
    return config.model_copy(update={"run": config.run.model_copy(update=changes)})


@pytest.mark.parametrize(
    ("nodes", "place", "places"),
    [
        # 3 CPUs in all, and no node with room for a worker of 1 and its reader of 0.5 beside the first
        ([{"CPU": 1.0}, {"CPU": 2.0}], {"CPU": 1.5}, 1),
        ([{"CPU": 3.0, "GPU": 1.0}, {"CPU": 3.0}], {"CPU": 1.5, "GPU": 1.0}, 1),
        ([{"CPU": 0.3}], {"CPU": 0.1}, 3),
        ([], {"CPU": 1.0}, 0),
    ],
)
def test_no_worker_lies_across_two_nodes(nodes, place, places):
    assert elastic.room(nodes, place) == places


def test_the_readers_are_in_an_open_numbers_places_and_the_line_names_the_setting(monkeypatch):
    monkeypatch.setattr(elastic, "nodes_now", lambda: [{"CPU": 1.0}, {"CPU": 2.0}])
    assert elastic.place_of(with_run(workers=2)) == {"CPU": 1.0}
    elastic.check_room(with_run(workers=2))
    config = with_run(workers=4, min_workers=2)
    assert elastic.place_of(config) == {"CPU": 1.5}
    with pytest.raises(ConfigError, match=r"run\.min_workers=2: the nodes have room for 1 workers .*data\.reader_cpus"):
        elastic.check_room(config)


@pytest.mark.parametrize("kind", ["feedback", "onestep"])
def test_actors_with_places_do_not_go_with_an_open_number(kind):
    """The line names the setting by the name that the job has for it."""
    lora, places = str(paths.LORAS / "tscd-k1.safetensors"), PlacementConfig(where="actors", num_cpus=0.5)
    if kind == "feedback":
        config = FEEDBACK_RECIPES["tiny"](lora=lora).model_copy(update={"placement": places})
        setting = "placement"
    else:
        config = ONESTEP_RECIPES["tiny"](init=lora, feedback=True)
        config = config.model_copy(update={"feedback": config.feedback.model_copy(update={"placement": places})})
        setting = "feedback.placement"
    config = config.model_copy(
        update={
            "run": config.run.model_copy(update={"min_workers": 1}),
            "data": config.data.model_copy(update={"cache": "disk"}),
        }
    )
    with pytest.raises(ConfigError, match=rf"with {setting}\.num_cpus=0\.5: .* set {setting}\.where=local or"):
        checks.check_open_number(config)


def test_an_open_number_waits_shorter_than_the_default(monkeypatch):
    """And what is set in the environment stays."""
    monkeypatch.delenv(elastic.START_TIMEOUT, raising=False)
    for settings, seconds in ((with_run(min_workers=1).run, "25"), (with_run().run, "600")):
        with elastic.start_timeout(settings):
            assert os.environ[elastic.START_TIMEOUT] == seconds
        assert elastic.START_TIMEOUT not in os.environ
    monkeypatch.setenv(elastic.START_TIMEOUT, "7")
    with elastic.start_timeout(with_run(min_workers=1).run):
        assert os.environ[elastic.START_TIMEOUT] == "7"
