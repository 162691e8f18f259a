"""`ray up` files: Ray's schema and rules, what its autoscaler makes of our recipes on them, the clouds' own fields."""

from __future__ import annotations

import copy
import re

import click
import jsonschema
import pytest
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

from hypersd_ray.config.data import ActorPool
from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.config.rewards import PlacementConfig
from hypersd_ray.config.run import RunConfig
from hypersd_ray.recipes.feedback import feedback_sdxl
from hypersd_ray.recipes.tscd import sd15, sdxl
from tests.cluster.clouds import compute_complaints, ec2_complaints
from tests.cluster.ray_up import CLUSTER, Demand, checked, load, plan, ray_start

CLOUDS = {"aws": ec2_complaints, "gcp": compute_complaints}
FILES = [*CLOUDS, "local"]
POOL = "hypersd/pool"


def training(run: RunConfig) -> Demand:
    """The workers of a run: Ray Train's placement group."""
    return Demand(run.workers, {"CPU": run.cpus_per_worker, "GPU": run.gpus_per_worker}, gang=True)


def encoders(pool: ActorPool) -> Demand:
    """All actors that a pool may have, with the settings that the files' comments name."""
    assert pool.max_size is not None
    return Demand(pool.max_size, {"GPU": pool.num_gpus}, {POOL: "encode"})


def evaluators(config: FeedbackConfig) -> Demand:
    """The shared actors of a feedback run, labelled as the files' comments say."""
    own: PlacementConfig = config.placement
    amounts = {"CPU": own.num_cpus, "GPU": own.num_gpus}
    resources = {name: amount for name, amount in amounts.items() if amount}
    return Demand(len(config.models) * own.replicas, resources, {POOL: "reward"})


@pytest.fixture
def feedback(tmp_path) -> FeedbackConfig:
    """The SDXL recipe's, whose teacher and LoRA are only names here."""
    (tmp_path / "lora.safetensors").touch()
    return feedback_sdxl(str(tmp_path), str(tmp_path / "lora.safetensors"), str(tmp_path))


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_the_file(name):
    prepared = checked(load(name))
    assert prepared["available_node_types"][prepared["head_node_type"]]["min_workers"] >= 0
    assert prepared["head_start_ray_commands"] and prepared["worker_start_ray_commands"]


@pytest.mark.parametrize("name", FILES)
def test_ray_start_has_the_options_and_every_node_asks_for_the_token(name):
    config = load(name)
    head, worker = (ray_start(config[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    assert head["head"] and not worker["head"]
    assert head["autoscaling_config"] and worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
    assert head["dashboard_host"] == "127.0.0.1"
    assert head["metrics_export_port"] == worker["metrics_export_port"] == 8080
    for kind in ("head", "worker"):
        assert "RAY_AUTH_MODE=token" in config[f"{kind}_start_ray_commands"][-1]
    assert any(path.endswith("/.ray/auth_token") for path in config["file_mounts"])


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_is_refused(name):
    config = load(name)
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        checked(config | {"idle_timeout_minute": 5})
    with pytest.raises(click.ClickException, match="dashboard-hots"):
        ray_start([config["head_start_ray_commands"][-1] + " --dashboard-hots=127.0.0.1"])


@pytest.mark.parametrize("name", CLOUDS)
def test_a_wrong_node_type_is_refused(name):
    def changed(**values: object) -> dict:
        config = copy.deepcopy(load(name))
        config["available_node_types"]["train-spot"] |= values
        return config

    with pytest.raises(jsonschema.ValidationError, match="priorty"):
        checked(changed(priorty=3))
    with pytest.raises(jsonschema.ValidationError, match="-8"):
        checked(changed(resources={"CPU": 96, "GPU": -8}))
    with pytest.raises(ValueError, match="max_workers"):
        checked(changed(min_workers=21))  # the cluster's max_workers is 20
    with pytest.raises(AssertionError, match="container & image"):
        checked(load(name) | {"docker": {"image": "x"}})


@pytest.mark.parametrize("name", CLOUDS)
def test_the_cloud_knows_every_field_of_a_node(name):
    for node_type in load(name)["available_node_types"].values():
        assert CLOUDS[name](node_type["node_config"]) == []


def test_the_clouds_descriptions_find_what_is_wrong():
    head = load("aws")["available_node_types"]["head"]["node_config"]
    assert "Spott" in ec2_complaints(head | {"Spott": True})[0]
    assert "p4de.24xlrage" in ec2_complaints(head | {"InstanceType": "p4de.24xlrage"})[0]
    assert "VolumeSize" in ec2_complaints(head | {"BlockDeviceMappings": [{"Ebs": {"VolumeSize": "big"}}]})[0]
    head = load("gcp")["available_node_types"]["head"]["node_config"]
    assert "preemptable" in compute_complaints(head | {"scheduling": {"preemptable": True}})[0]
    assert "SPOTS" in compute_complaints(head | {"scheduling": {"provisioningModel": "SPOTS"}})[0]
    assert "disks" in compute_complaints(head | {"disks": {"boot": True}})[0]


@pytest.mark.parametrize("name", CLOUDS)
def test_an_empty_cluster_is_the_head_alone_and_nothing_runs_on_it(name):
    config = load(name)
    types = config["available_node_types"]
    assert all(t.get("min_workers", 0) == 0 for t in types.values())
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    for node_type in types.values():
        validate_node_label_syntax(node_type.get("labels", {}))


@pytest.mark.parametrize("name", FILES)
def test_jobs_wait_for_nodes_only_where_nodes_may_come(name):
    """trainer/run.py and actors/placement.py read the head's RAY_AUTOSCALING."""
    assert ("RAY_AUTOSCALING=1" in load(name)["head_start_ray_commands"][-1]) == (name in CLOUDS)


@pytest.mark.parametrize("name", CLOUDS)
def test_the_recipes_find_their_nodes(name, tmp_path, feedback):
    config = load(name)
    large, small = sdxl(str(tmp_path)), sd15(str(tmp_path))
    assert plan(config, training(large.run)) == ({"train-spot": 4}, 0)
    assert plan(config, training(small.run)) == ({"train-spot": 1}, 0)
    assert plan(config, encoders(large.data.encoder)) == ({"encode": 1}, 0)  # 8 actors of half a GPU
    assert plan(config, encoders(small.data.encoder)) == ({"encode": 1}, 0)
    assert plan(config, evaluators(feedback)) == ({"reward": 1}, 0)  # 6 models on one GPU
    assert plan(config, Demand(100, {"CPU": large.data.reader_cpus})) == ({"data": 2}, 0)


@pytest.mark.parametrize("name", CLOUDS)
def test_no_training_worker_lands_on_a_small_gpu(name, tmp_path, feedback):
    """33 workers on 32 large GPUs: a fifth large node, and never one of the idle GPUs for rewards and encoding."""
    config = load(name)
    run = sdxl(str(tmp_path)).run.model_copy(update={"workers": 33})
    nodes, missing = plan(config, evaluators(feedback), training(run))
    assert (nodes, missing) == ({"reward": 1, "train-spot": 4, "train-on-demand": 1}, 0)


@pytest.mark.parametrize("name", CLOUDS)
def test_what_no_node_type_has_stays_unplaced(name, tmp_path, feedback):
    config = load(name)
    too_many = sdxl(str(tmp_path)).run.model_copy(update={"workers": 65})
    assert plan(config, training(too_many)) == ({}, 1)
    wrong_label = Demand(1, {"GPU": 0.25}, {POOL: "rewards"})
    assert plan(config, wrong_label) == ({}, 1)
    with_cpus = Demand(1, {"CPU": 1, "GPU": 0.5}, {POOL: "encode"})  # data.encoder.num_cpus left at its default
    assert plan(config, with_cpus) == ({}, 1)


@pytest.mark.parametrize("name", CLOUDS)
def test_on_demand_stands_in_for_spot_as_far_as_ray_goes(name, tmp_path):
    """As the files say: after a node that did not come up, but not after a request that the cloud refused."""
    config, workers = load(name), training(sdxl(str(tmp_path)).run)

    def seen(status: Instance.InstanceStatus) -> CloudResourceMonitor:
        monitor = CloudResourceMonitor()
        monitor.notify([InstanceUpdateEvent(instance_type="train-spot", new_instance_status=status)])
        return monitor

    assert plan(config, workers, monitor=seen(Instance.ALLOCATION_TIMEOUT)) == ({"train-on-demand": 4}, 0)
    assert plan(config, workers, monitor=seen(Instance.ALLOCATION_FAILED)) == ({"train-spot": 4}, 0)
    config["available_node_types"]["train-spot"]["max_workers"] = 0  # what the files tell one to do then
    assert plan(config, workers) == ({"train-on-demand": 4}, 0)


def test_both_clouds_offer_the_same_types():
    aws, gcp = (load(name)["available_node_types"] for name in CLOUDS)
    for node_type in aws:
        ours, theirs = ({k: v for k, v in t[node_type].items() if k != "node_config"} for t in (aws, gcp))
        assert ours == theirs


@pytest.mark.parametrize("name", FILES)
def test_no_secret_is_written_down(name):
    text = (CLUSTER / f"{name}.yaml").read_text()
    assert not re.search(r"AKIA|BEGIN [A-Z ]*PRIVATE KEY|hf_[A-Za-z0-9]{8}|RAY_AUTH_TOKEN=|password", text)
