"""More than the cluster will ever have: one line for what stands beside the workers too."""

from __future__ import annotations

import sys

import pytest
import ray
from ray.core.generated.autoscaler_pb2 import AutoscalingState

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.data import ActorPool
from hypersd_ray.config.run import RunConfig
from hypersd_ray.embedded import paths
from hypersd_ray.recipes.feedback import feedback_sd15
from hypersd_ray.trainer import places, room
from hypersd_ray.trainer import run as trainer_run
from jobs import pairs, synthesize

NONE = {"CPU": 0.0, "GPU": 0.0}


@pytest.fixture
def cluster_of(monkeypatch):
    """cluster_of(have, most, free): what Ray and its autoscaler say."""
    monkeypatch.delenv("RAY_AUTOSCALING", raising=False)

    def make(have, most=None, free=None):
        monkeypatch.setattr(ray, "cluster_resources", lambda: have)
        monkeypatch.setattr(ray, "available_resources", lambda: have if free is None else free)
        monkeypatch.setattr(room, "most_there_will_be", lambda: most)

    return make


def test_the_actors_of_a_published_recipe_take_one_gpu_more_than_the_workers(cluster_of, tmp_path, monkeypatch):
    lora = tmp_path / "lora.safetensors"
    lora.touch()
    config = feedback_sd15(str(tmp_path), str(lora), "models")
    watched = {reward.name for reward in config.watched}
    assert watched == {"clip_score", "pick_score", "hps_v21"} and len(config.models) == 6
    cluster_of({"CPU": 64.0, "GPU": 9.0})
    room.check_actors(config, NONE)
    cluster_of({"CPU": 64.0, "GPU": 8.0})
    with pytest.raises(
        ConfigError, match=r"run\.workers=8 and 6 reward actors with placement\.num_gpus=0\.16 each need"
    ) as e:
        room.check_actors(config, NONE)
    assert "8.96 GPU, the cluster has 8: lower run.workers, placement.num_gpus" in str(e.value)
    monkeypatch.setenv("RAY_AUTOSCALING", "1")
    room.check_actors(config, NONE)
    cluster_of({"GPU": 8.0}, {"GPU": 8.5})
    with pytest.raises(ConfigError, match=r"autoscaler adds nodes up to 8\.5"):
        room.check_actors(config, NONE)
    local = config.placement.model_copy(update={"where": "local"})
    room.check_actors(config.model_copy(update={"placement": local}), NONE)


def test_workers_and_pools(cluster_of):
    cluster_of({"CPU": 2.0})
    room.check_workers(RunConfig(workers=2))
    with pytest.raises(ConfigError, match=r"run\.workers=2 with run\.gpus_per_worker=1 need 2 GPU, the cluster has 0"):
        room.check_workers(RunConfig(workers=2, gpus_per_worker=1))
    room.check_pool(ActorPool(min_size=1, num_cpus=1.5), "pool", reader_cpus=0.5)
    with pytest.raises(ConfigError, match=r"pool\.min_size=2 with pool\.num_cpus=1 and a reader .* need 2\.5 CPU"):
        room.check_pool(ActorPool(min_size=2, max_size=2), "pool", reader_cpus=0.5)


def test_another_jobs_impossible_request_is_not_ours_and_waiting_says_for_what(cluster_of):
    state = AutoscalingState(autoscaler_state_version=3)
    state.infeasible_gang_resource_requests.add(details="aa11:PACK|PENDING")
    state.pending_instance_requests.add(ray_node_type_name="gpu", count=2)
    state.failed_instance_requests.add(ray_node_type_name="spot", reason="no\ncapacity")
    assert places.understood(state, "aa11").infeasible
    now = places.understood(state, "bb22")
    assert not now.infeasible and (now.speaks, now.coming) == (True, 2)
    cluster_of({"CPU": 4.0})
    assert places.waiting_line(RunConfig(workers=2), {"CPU": 3.0, "GPU": 1.0}, now, 61.2) == (
        "waiting for nodes since 61 s: 2 workers need 6 CPU (now 4), 2 GPU (now 0); 2 on their way; 1 were refused, the last "
        "spot: no capacity"
    )
    assert "the autoscaler says nothing" in places.waiting_line(
        RunConfig(), {"CPU": 1.0}, places.understood(AutoscalingState(), "bb22"), 30.0
    )


def test_what_others_hold_is_said(cluster_of):
    cluster_of({"CPU": 8.0, "GPU": 4.0}, free={"CPU": 8.0, "GPU": 1.5})
    assert places.held({"CPU": 1.0, "GPU": 1.0}) == {"GPU": 2.5}
    assert places.held({"CPU": 1.0}) == {}
    now = places.Autoscaler(speaks=True, infeasible=True, coming=0)
    assert places.waiting_line(RunConfig(), {"GPU": 1.0}, now, 5.0).endswith("0 on their way; other work has 2.5 GPU")


@pytest.mark.parametrize("job", [synthesize, pairs])
def test_what_is_wrong_is_said_before_a_cluster_and_a_pool_without_room_at_once(job, cluster_of, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a cat")
    asked = []
    for place in (job, trainer_run):  # where the job has it from
        monkeypatch.setattr(place, "connect", lambda: asked.append(True), raising=False)
    cluster_of({"CPU": 4.0})

    def run(teacher, *options):
        where = ["--out", str(tmp_path / "out")]
        where += (
            ["--model", teacher, "--prompts", str(tmp_path / "prompts.txt")]
            if job is synthesize
            else ["--teacher", teacher, "--data.shards", str(paths.DATA / "val-00001.tar"), "--data.resolution", "32"]
        )
        monkeypatch.setattr(sys, "argv", ["job", *where, *options])
        job.main()

    with pytest.raises(ValueError, match="nowhere"):
        run("/nowhere")
    assert not asked
    field = "pool" if job is synthesize else "data.encoder"
    said = rf"{field}\.min_size=1 with {field}\.num_gpus=1 need 1 GPU, the cluster has 0: lower {field}\.num_gpus"
    with pytest.raises(ConfigError, match=said):
        run(str(paths.TEACHER), f"--{field}.num-gpus", "1")
    assert asked and not (tmp_path / "out").exists()
