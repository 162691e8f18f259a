"""Real actors on a real cluster: equal to the models in-process, shared, killed, and not placeable."""

import os
import signal
import time

import pytest
import ray
import torch

from hypersd_ray.actors import placement
from hypersd_ray.actors.client import RemoteBackend
from hypersd_ray.actors.placement import check_placeable, start_evaluators, stop_evaluators
from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.rewards import PlacementConfig, RewardConfig
from hypersd_ray.models.perception.protocol import Instances, no_instances
from hypersd_ray.models.scoring import RewardClient, local_backend
from tests.helpers.rays import own_ray

pytestmark = pytest.mark.cluster

PROMPTS = ["a noto penguin on a yellow background", "a twemoji red apple on a sky background", "", "a noto pizza"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    labels = {"hypersd/pool": "reward"}
    with own_ray(3, labels=labels):
        yield


@pytest.fixture(scope="module")
def handles(cluster, models):
    started = start_evaluators(models, PlacementConfig(wait_ms=20), "test")
    yield started
    stop_evaluators(started)


def annotation() -> Instances:
    masks = torch.zeros(1, 32, 32, dtype=torch.bool)
    masks[0, 4:28, 6:26] = True
    return Instances(masks, torch.tensor([1]))


def told():
    return {
        "aesthetic_v2": PROMPTS,
        "clip_score": PROMPTS,
        "solo": [annotation(), no_instances(32, 32), annotation(), annotation()],
    }


def values_and_gradient(client, images):
    x = images.clone().requires_grad_(True)
    scores = client(x, told())
    sum(s.values.sum() for s in scores.values()).backward()
    return {name: s.values.detach() for name, s in scores.items()}, x.grad


def test_remote_is_local_to_half_precision(handles, models, pictures):
    """Values and summed gradient of three models, the instance loss among them."""
    remote, d_remote = values_and_gradient(RewardClient(RemoteBackend(handles)), pictures[:4])
    local, d_local = values_and_gradient(RewardClient(local_backend(models, "cpu")), pictures[:4])
    assert remote.keys() == local.keys() == told().keys()
    for name in local:
        torch.testing.assert_close(remote[name], local[name], rtol=2e-3, atol=2e-3)
    assert local["solo"][1] == 0
    assert (d_remote - d_local).abs().max() < 5e-3 * d_local.abs().max()
    assert d_local.abs().amax((1, 2, 3)).min() > 0


@ray.remote(num_cpus=1)
def a_worker(actor, images, prompts):
    """Another process; torch stays out of it, its import would take longer than the test."""
    return [ray.get(actor.evaluate.remote(images, prompts, True)).values.tolist() for _ in range(3)]


def test_workers_share_one_model(handles, pictures):
    """Two workers at once: one process answers both, and calls are joined."""
    actor, images = handles["clip_score"][0], pictures[:4].half().numpy()
    before = ray.get(actor.counts.remote())
    a, b = ray.get([a_worker.remote(actor, images, PROMPTS) for _ in range(2)])
    after = ray.get(actor.counts.remote())
    assert a == b and after["pid"] == before["pid"]
    assert after["calls"] - before["calls"] == 6 and after["images"] - before["images"] == 24
    # single calls sent together are joined: 16 calls, far fewer batches
    image = ray.put(images[:1])
    ray.get([actor.evaluate.remote(image, PROMPTS[:1], True) for _ in range(16)])
    joined = ray.get(actor.counts.remote())
    assert joined["calls"] - after["calls"] == 16 and joined["batches"] - after["batches"] <= 8


def test_a_killed_actor_comes_back_and_no_call_is_lost(handles, models, pictures):
    """SIGKILL with calls under way: each gets its answer, the same as before."""
    client = RewardClient(RemoteBackend(handles))
    expected = client(pictures[:4], {"aesthetic_v2": PROMPTS})["aesthetic_v2"].values.detach()
    actor = handles["aesthetic_v2"][0]
    pid = ray.get(actor.counts.remote())["pid"]
    image = ray.put(pictures[:4].half().numpy())
    under_way = [actor.evaluate.remote(image, PROMPTS, True) for _ in range(8)]
    os.kill(pid, signal.SIGKILL)
    answers = ray.get(under_way, timeout=400)  # the new process imports torch
    assert len(answers) == 8
    for answer in answers:
        torch.testing.assert_close(torch.tensor(answer.values), expected)
    again = client(pictures[:4], {"aesthetic_v2": PROMPTS})["aesthetic_v2"]
    torch.testing.assert_close(again.values.detach(), expected)
    assert ray.get(actor.counts.remote())["pid"] != pid


def test_what_a_model_refuses_reaches_the_caller(handles, pictures):
    client = RewardClient(RemoteBackend(handles))
    with pytest.raises(ValueError, match=r"solo: annotation masks are \(8, 8\), the picture is \(32, 32\)"):
        client(pictures[:1], {"solo": [no_instances(8, 8)]})


def test_no_gpu_is_one_line_at_once(cluster, models):
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=r"wants 0.5 GPU \(placement.num_gpus\), the largest node has 0: lower") as e:
        start_evaluators(models, PlacementConfig(num_gpus=0.5), "nowhere")
    assert time.monotonic() - begun < 5 and "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="no node has the labels"):
        check_placeable(PlacementConfig(label_selector={"market": "spot"}))


def test_where_nodes_may_come_actors_wait_for_them_as_long_as_they_are_told(cluster, models, monkeypatch):
    monkeypatch.setenv("RAY_AUTOSCALING", "1")
    check_placeable(PlacementConfig(label_selector={"hypersd/pool": "another"}))
    with pytest.raises(ConfigError, match=r"found no place in [4-9] s .*raise placement.place_timeout_s") as e:
        start_evaluators(models, PlacementConfig(num_gpus=0.5, place_timeout_s=4), "coming")
    assert "\n" not in str(e.value)


def test_no_free_cpu_is_one_line_within_the_time(cluster, models):
    """Three actors of two CPUs each on a node of three: the second and third wait, and the job does not hang."""
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=r"2 of 3 reward actors found no place in 1\d s .*wants 2 CPU") as e:
        start_evaluators(models, PlacementConfig(num_cpus=2, place_timeout_s=12), "crowded")
    assert time.monotonic() - begun < 40 and "\n" not in str(e.value)


@pytest.mark.parametrize("pool", ["reward", "!another"])
def test_only_nodes_with_the_labels_have_room(cluster, pool, monkeypatch):
    """The labelled node is full and another is not; where the selector is an operator, the time is the limit."""
    there = {node["NodeID"]: {"CPU": 0.0} for node in ray.nodes()} | {"another": {"CPU": 8.0}}
    nodes = [*ray.nodes(), {"NodeID": "another", "Alive": True, "Labels": {}}]
    monkeypatch.setattr(placement.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(placement, "available_resources_per_node", lambda: there)
    wanted = PlacementConfig(num_cpus=1, label_selector={"hypersd/pool": pool})
    assert not placement._has_room(wanted)
    assert placement._has_room(wanted.model_copy(update={"label_selector": {}}))


def test_a_broken_checkpoint_is_named(cluster, models, tmp_path):
    (tmp_path / "head.pth").write_bytes(b"nothing")
    broken = RewardConfig(name="aesthetic_v2", checkpoint=str(tmp_path / "head.pth"), tower=models[0].tower)
    with pytest.raises(ValueError, match=r"aesthetic_v2: .*head.pth cannot be read"):
        start_evaluators([broken], PlacementConfig(), "broken")
