"""The training's Grafana dashboard draws what the code measures, and what is measured is seen."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import ray.dashboard.modules.metrics.dashboards as rays_dashboards

from hypersd_ray.data.rejects import GaugedCounter
from hypersd_ray.trainer.logs import Prometheus

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "cluster/grafana.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
METRIC = re.compile(r"\b(?:ray|autoscaler)_\w+\b")


def names(text: str) -> set[str]:
    """Metrics in a query; not the words between braces, after `by` or in quotes."""
    bare = re.sub(r"\{[^}]*\}|by \([^)]*\)|on\([^)]*\)|\"[^\"]*\"", " ", text)
    return set(METRIC.findall(bare))


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Name -> labels of each gauge of a run, as Ray's agent exports it."""
    ours = Prometheus("name")
    gauges = [*ours.gauges.values(), ours.step, ours.part, ours.reward, GaugedCounter(None, 0.5, 1, "name").gauge]
    return {f"ray_{g.info['name']}": set(g.info["tag_keys"]) for g in gauges}


def test_every_metric_that_is_drawn_is_registered(exported):
    """Ours by the code; Ray's own by the dashboards that Ray ships."""
    folder = Path(rays_dashboards.__path__[0])
    rays = {name for path in folder.glob("*_panels.py") for name in METRIC.findall(path.read_text())}
    drawn = set().union(*map(names, QUERIES))
    assert {n for n in drawn if n.startswith("ray_hypersd_")} <= exported.keys()
    assert {n for n in drawn if not n.startswith("ray_hypersd_")} <= rays
    assert names('sum by (ray_x) (rate(ray_hypersd_lost{run=~"$run"}[1m]))') == {"ray_hypersd_lost"}
    assert "ray_hypersd_lost" not in exported.keys() | rays


def test_every_metric_of_a_run_is_drawn_with_labels_that_it_has(exported):
    assert exported.keys() <= set().union(*map(names, QUERIES))
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            for name, selector in re.findall(r"(ray_hypersd_\w+)\{([^}]*)\}", target["expr"]):
                assert set(re.findall(r"(\w+)=~?", selector)) <= exported[name]
                assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= exported[name]


def test_what_the_loop_logs_reaches_the_gauges(exported):
    """A step's values as the three kinds of run name them; what no gauge takes is refused by nobody."""
    sets: list[tuple[str, dict]] = []
    ours = Prometheus("name")
    for gauge in (*ours.gauges.values(), ours.step, ours.part, ours.reward):
        gauge.set = lambda value, tags, name=gauge.info["name"]: sets.append((name, tags | {"value": value}))
    values = {
        "loss": 1.0,
        "consistency": 2.0,
        "dmd": 3.0,
        "reward/image_reward": 4.0,
        "watch/clip_score": 5.0,
        "x": 6.0,
    }
    ours.scalars(7, values)
    assert sets == [
        ("hypersd_step", {"run": "name", "value": 7}),
        ("hypersd_loss", {"run": "name", "value": 1.0}),
        ("hypersd_loss_part", {"run": "name", "part": "consistency", "value": 2.0}),
        ("hypersd_loss_part", {"run": "name", "part": "dmd", "value": 3.0}),
        ("hypersd_reward", {"run": "name", "model": "image_reward", "role": "train", "value": 4.0}),
        ("hypersd_reward", {"run": "name", "model": "clip_score", "role": "watch", "value": 5.0}),
    ]


def test_rejected_rows_reach_their_gauge():
    counter, shown = GaugedCounter(None, 0.5, 1, "name"), {}
    counter.gauge.set = lambda value, tags: shown.update({(tags["run"], tags["reason"]): value})
    counter.report("a.tar", 10, [("small", "1"), ("small", "2"), ("nsfw", "3")])
    counter.report("b.tar", 10, [("small", "4")])
    counter.report("b.tar", 10, [("small", "4")])  # read again in the next epoch
    assert shown == {("name", "small"): 3, ("name", "nsfw"): 1}
    counter.report("b.tar", 1, [("unreadable_shard", "b.tar")])  # and gone in the one after
    assert shown[("name", "unreadable_shard")] == 9


def test_panels_are_whole_and_do_not_overlap():
    assert len({p["id"] for p in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        own = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not own & cells and place["x"] + place["w"] <= 24
        cells |= own
        assert panel["title"] and all(t["expr"] and t["refId"] for t in panel["targets"])
    serving = json.loads((ROOT / "serve/config/grafana.json").read_text())
    assert DASHBOARD.keys() == serving.keys() and DASHBOARD["uid"] != serving["uid"]
    assert DASHBOARD["panels"][0].keys() == serving["panels"][0].keys()
