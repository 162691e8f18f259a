"""Kubernetes files: the fields that KubeRay and Kubernetes know, and what Ray's autoscaler makes of our recipes on them."""

from __future__ import annotations

import copy
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jsonschema
import pydantic
import pytest
import yaml
from ray._private import ray_constants
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema

from hypersd_ray.config.cli import parse
from hypersd_ray.config.run import RunConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.recipes import RECIPES
from hypersd_ray.recipes.feedback import feedback_sdxl
from hypersd_ray.recipes.tscd import sdxl
from serve.app import read_settings
from tests.cluster.kuberay import KINDS, RayClusterSpec, documents, kubernetes
from tests.cluster.ray_up import ROOT, Demand, plan, ray_start
from tests.cluster.test_ray_up import encoders, evaluators, training

NAMES = list(KINDS)


def the(name: str) -> dict[str, Any]:
    """The one object of a file."""
    (document,) = documents(name)
    return document


def spec_of(name: str) -> RayClusterSpec:
    """The cluster in a file."""
    return KINDS[name].model_validate(the(name)).cluster


def derived(name: str) -> dict[str, Any]:
    """What Ray's autoscaler on the head reads out of the file's cluster."""
    document = the(name)
    spec = document["spec"].get("rayClusterSpec") or document["spec"].get("rayClusterConfig") or document["spec"]
    return _derive_autoscaling_config_from_ray_cr({"metadata": {"name": name, "namespace": "default"}, "spec": spec})


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_one_that_kuberay_or_kubernetes_knows(name):
    spec = spec_of(name)
    assert spec.authOptions and spec.authOptions.mode == "token"
    assert spec.enableInTreeAutoscaling and spec.autoscalerOptions and spec.autoscalerOptions.version == "v2"
    assert spec.headGroupSpec.rayStartParams["num-cpus"] == "0"


def strict(schema: Any) -> Any:
    """The same with no properties but those that it names, as `kubectl apply` has it."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields")
    more = {"additionalProperties": False} if closed and schema.get("type") == "object" else {}
    return more | {key: strict(part) for key, part in schema.items()}


@pytest.mark.skipif("HYPERSD_KUBERAY_CRDS" not in os.environ, reason="HYPERSD_KUBERAY_CRDS, a folder of KubeRay's CRDs")
@pytest.mark.parametrize("name", NAMES)
def test_kuberays_own_definitions_take_the_files(name):
    """No package has them: ray-operator/config/crd/bases of a checkout of KubeRay."""
    crd = yaml.safe_load((Path(os.environ["HYPERSD_KUBERAY_CRDS"]) / f"ray.io_{name}s.yaml").read_text())
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1"]
    jsonschema.validate(the(name), strict(schema))


def test_the_volume_that_all_mount_is_shared_and_there():
    (claim,) = documents("storage")
    kubernetes(claim)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for name in NAMES:
        spec = spec_of(name)
        for group in (spec.headGroupSpec, *spec.workerGroupSpecs):
            pod = group.template["spec"]
            (volume,) = pod["volumes"]
            assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
            mounts = pod["containers"][0]["volumeMounts"]
            assert {m["name"] for m in mounts} == {volume["name"]} and "/shared" in {m["mountPath"] for m in mounts}


def _set(*path: str | int, value: Any) -> Callable[[dict], None]:
    def change(document: Any) -> None:
        for part in path[:-1]:
            document = document[part]
        document[path[-1]] = value

    return change


HEAD, GROUP = ("spec", "headGroupSpec"), ("spec", "workerGroupSpecs", 0)
POD = (*GROUP, "template", "spec")


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("raycluster", _set("spec", "autoscalerOption", value={}), "autoscalerOption"),
        ("raycluster", _set("spec", "autoscalerOptions", "version", value="v3"), "'v1' or 'v2'"),
        ("raycluster", _set("spec", "autoscalerOptions", "version", value="v1"), "for autoscaler v2"),
        ("raycluster", _set("spec", "autoscalerOptions", "env", value=[{"nam": "x"}]), "nam"),
        ("raycluster", _set("spec", "authOptions", "mode", value="tokens"), "'disabled' or 'token'"),
        ("raycluster", _set(*HEAD, "rayStartParams", "num-cpus", value=0), "valid string"),
        ("raycluster", _set(*GROUP, "priorty", value=1), "priorty"),
        ("raycluster", _set(*GROUP, "maxReplicas", value="4"), "valid integer"),
        ("raycluster", _set(*GROUP, "replicas", value=5), "not within 0..4"),
        ("raycluster", _set(*GROUP, "groupName", value="reward"), "groupName twice"),
        ("raycluster", _set(*POD, "toleration", value=[]), "toleration"),
        ("raycluster", _set(*POD, "tolerations", value=[{"key": "a", "operater": "Exists"}]), "operater"),
        ("raycluster", _set(*POD, "containers", 0, "resources", "limit", value={}), "limit"),
        ("raycluster", _set(*POD, "containers", 0, "securityContext", "runAsUser", value="ray"), "runAsUser"),
        ("raycluster", _set("metadata", "lables", value={}), "lables"),
        ("rayjob", _set("spec", "entryPoint", value="x"), "entryPoint"),
        ("rayjob", _set("spec", "deletionStrategy", "deletionRules", 0, "policy", value="DeleteAll"), "DeleteCluster"),
        (
            "rayjob",
            _set("spec", "deletionStrategy", "deletionRules", 0, "policy", value="DeleteWorkers"),
            "does not go",
        ),
        ("rayjob", _set("spec", "deletionStrategy", "deletionRules", 0, "condition", value={}), "exactly one of"),
        ("rayjob", _set("spec", "shutdownAfterJobFinishes", value=True), "deletionRules with"),
        ("rayservice", _set("spec", "serveConfig", value=""), "serveConfig"),
        ("rayservice", _set("spec", "serveConfigV2", value={}), "valid string"),
        ("rayservice", _set("spec", "upgradeStrategy", "type", value="Newcluster"), "NewCluster"),
    ],
)
def test_a_wrong_file_is_refused(name, change, complaint):
    document = copy.deepcopy(the(name))
    change(document)
    with pytest.raises(pydantic.ValidationError, match=complaint):
        KINDS[name].model_validate(document)


@pytest.mark.parametrize("name", NAMES)
def test_ray_start_takes_the_parameters_and_labels_are_labels(name):
    spec = spec_of(name)
    for group in (spec.headGroupSpec, *spec.workerGroupSpecs):
        options = [f"--{option}={value}" for option, value in group.rayStartParams.items()]
        assert ray_start([f"ray start {shlex.join(options)}"])["metrics_export_port"] == 8080
        validate_node_label_syntax(group.labels)
    with pytest.raises(click.ClickException, match="num-cpu"):
        ray_start(["ray start --num-cpu=0"])
    with pytest.raises(click.ClickException, match="none"):
        ray_start(["ray start --num-cpus=none"])


def test_the_recipes_find_their_nodes(tmp_path):
    """The sums of test_ray_up.py, on what the autoscaler reads out of the RayCluster."""
    config, large = derived("raycluster"), sdxl(str(tmp_path))
    (tmp_path / "lora.safetensors").touch()
    feedback = feedback_sdxl(str(tmp_path), str(tmp_path / "lora.safetensors"), str(tmp_path))
    assert plan(config, training(large.run)) == ({"train-spot": 4}, 0)
    assert plan(config, evaluators(feedback), encoders(large.data.encoder)) == ({"reward": 1, "encode": 1}, 0)
    assert plan(config, Demand(100, {"CPU": large.data.reader_cpus})) == ({"data": 2}, 0)
    more = large.run.model_copy(update={"workers": 33})
    assert plan(config, evaluators(feedback), training(more)) == (
        {"reward": 1, "train-spot": 4, "train-on-demand": 1},
        0,
    )
    assert plan(config, training(large.run.model_copy(update={"workers": 65}))) == ({}, 1)
    assert all(node["min_workers"] == 0 for node in config["available_node_types"].values())


def test_the_jobs_entrypoint_is_a_job_of_ours_and_fits_its_cluster(tmp_path):
    """Its options are read by the job's own parser, with a teacher that is there in place of the volume's."""
    words = shlex.split(the("rayjob")["spec"]["entrypoint"])
    assert words[0] == "python" and (ROOT / words[1]).is_file()
    teacher = words.index("--teacher") + 1
    assert words[teacher].startswith("/shared/")
    config = parse(RECIPES, TSCDConfig, "", [*words[2:teacher], str(tmp_path), *words[teacher + 1 :]])
    assert config.run.out.startswith("/shared/") or "://" in config.run.out
    assert plan(derived("rayjob"), training(config.run)) == ({"train-spot": 4}, 0)


def test_the_service_serves_what_prod_yaml_says_and_its_replicas_fit():
    document = the("rayservice")
    served = yaml.safe_load(document["spec"]["serveConfigV2"])
    assert served == yaml.safe_load((ROOT / "serve/config/prod.yaml").read_text()), "copy prod.yaml's body again"
    schema = ServeDeploySchema.model_validate(served)
    demands = []
    for application in schema.applications:
        assert application.import_path == "serve.app:build"
        settings = read_settings(application.args)
        own, safety, ingress = settings.denoiser, settings.safety, settings.ingress
        demands.append(Demand(own.max_replicas or own.replicas, {"CPU": own.cpus, "GPU": own.gpus}))
        demands.append(Demand(ingress.replicas, {"CPU": ingress.cpus}))
        checker = {"CPU": safety.cpus} | ({"GPU": safety.gpus} if safety.gpus else {})
        demands.append(Demand(safety.replicas, checker))
    nodes, missing = plan(derived("rayservice"), *demands)
    assert missing == 0 and nodes["gpu"] <= 17
    pod = spec_of("rayservice").workerGroupSpecs[0].template["spec"]["containers"][0]
    assert {e["name"] for e in pod["env"]} >= {settings.ingress.api_key_env}
    mounts = tuple(m["mountPath"] for m in pod["volumeMounts"])
    for path in (settings.model.base, *settings.model.loras, settings.ingress.image_folder):
        assert str(path).startswith(mounts), f"{path} is on no volume"
    assert {p["containerPort"] for p in pod["ports"]} >= {served["http_options"]["port"]}


@pytest.mark.parametrize("name", NAMES)
def test_pods_run_without_root_and_hold_no_secret(name):
    spec = spec_of(name)
    for group in (spec.headGroupSpec, *spec.workerGroupSpecs):
        pod = group.template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
            for variable in container.get("env", []):
                assert "KEY" not in variable["name"] or "secretKeyRef" in variable["valueFrom"]
    for group in spec.workerGroupSpecs:
        limits = group.template["spec"]["containers"][0]["resources"]["limits"]
        tolerated = {t["key"] for t in group.template["spec"].get("tolerations", [])}
        assert ("nvidia.com/gpu" in limits) == ("nvidia.com/gpu" in tolerated)


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_jobs_wait_for_nodes(name):
    head = spec_of(name).headGroupSpec.template["spec"]["containers"][0]
    assert {"name": "RAY_AUTOSCALING", "value": "1"} in head["env"]


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_a_pod_that_is_taken_away_has_time_for_a_checkpoint(name):
    """Ray drains its node for longer than a run waits for a checkpoint, and is done before Kubernetes kills the pod."""
    for group in spec_of(name).workerGroupSpecs:
        pod = group.template["spec"]
        (drain,) = (e for e in pod["containers"][0]["env"] if e["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
        assert hasattr(ray_constants, drain["name"]), "Ray reads it under this name"
        assert RunConfig().stop_patience_s < float(drain["value"]) < pod["terminationGracePeriodSeconds"]


def test_kubernetes_own_schema_is_strict():
    (claim,) = documents("storage")
    with pytest.raises(ValueError, match="accessMode"):
        kubernetes(claim | {"spec": claim["spec"] | {"accessMode": []}})
    with pytest.raises(ValueError, match="storage"):
        kubernetes(claim | {"spec": claim["spec"] | {"resources": {"requests": {"storage": ["1Ti"]}}}})


def test_the_files_are_all_looked_at():
    assert {p.stem for p in Path(ROOT / "cluster/kuberay").glob("*")} == {*NAMES, "storage"}
