"""The fields of KubeRay's objects, for holding our files against: an unknown field or a wrong type is an error.

Written down here, in our own words, from what KubeRay says of its fields (names, types, enumerations, what its operator
refuses): RayCluster as of 1.6 with 1.7's `priority` and `secretName`, RayJob as of 1.5 with 1.6's deletion conditions,
RayService as of 1.5. These are not its custom resource definitions, and a field of KubeRay's that is missing here is a
line to add. What Kubernetes defines (pod templates, services, metadata, claims) is held against Kubernetes' own schemas,
which `kubernetes-validate` ships, strictly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import kubernetes_validate
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, model_validator

FOLDER = Path(__file__).parents[2] / "cluster" / "kuberay"
KUBERNETES = "1.34"

Count = Annotated[int, Strict(), Field(ge=0, lt=2**31)]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict()]
Map = dict[Text, Text]


def documents(name: str) -> list[dict[str, Any]]:
    """The objects in `cluster/kuberay/{name}.yaml`."""
    return list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text()))


def kubernetes(document: dict[str, Any]) -> None:
    """Raises ValueError where an object of Kubernetes' own has a field that its schema does not know, or a wrong type."""
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise ValueError(f"{'.'.join(map(str, error.absolute_path))}: {error.message}") from None


def _pod_template(template: dict[str, Any]) -> dict[str, Any]:
    kubernetes({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template})
    if not template.get("spec", {}).get("containers"):
        raise ValueError("spec.containers is empty")
    return template


def _container_part(name: str) -> AfterValidator:
    """A field of the autoscaler's container."""

    def check(value: Any) -> Any:
        _pod_template({"spec": {"containers": [{"name": "x", name: value}]}})
        return value

    return AfterValidator(check)


def _metadata(value: dict[str, Any]) -> dict[str, Any]:
    kubernetes({"apiVersion": "v1", "kind": "PodTemplate", "metadata": value})
    if not value.get("name") and not value.get("generateName"):
        raise ValueError("neither name nor generateName")
    return value


def _service(value: dict[str, Any]) -> dict[str, Any]:
    kubernetes({"apiVersion": "v1", "kind": "Service"} | value)
    return value


PodTemplate = Annotated[dict[str, Any], AfterValidator(_pod_template)]
Metadata = Annotated[dict[str, Any], AfterValidator(_metadata)]
Service = Annotated[dict[str, Any], AfterValidator(_service)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AuthOptions(_Fields):
    mode: Literal["disabled", "token"] = "token"
    secretName: Text | None = None
    enableK8sTokenAuth: Flag | None = None


class AutoscalerOptions(_Fields):
    version: Literal["v1", "v2"] | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    idleTimeoutSeconds: Count | None = None
    image: Text | None = None
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"] | None = None
    env: Annotated[list[dict[str, Any]], _container_part("env")] = []
    envFrom: Annotated[list[dict[str, Any]], _container_part("envFrom")] = []
    resources: Annotated[dict[str, Any], _container_part("resources")] = {}
    securityContext: Annotated[dict[str, Any], _container_part("securityContext")] = {}
    volumeMounts: Annotated[list[dict[str, Any]], _container_part("volumeMounts")] = []


class HeadGroup(_Fields):
    template: PodTemplate
    rayStartParams: Map = {}
    labels: Map = {}
    resources: Map = {}
    headService: Service | None = None
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"] | None = None
    enableIngress: Flag | None = None


class ScaleStrategy(_Fields):
    workersToDelete: list[Text] = []


class WorkerGroup(_Fields):
    groupName: Text
    template: PodTemplate
    minReplicas: Count
    maxReplicas: Count
    replicas: Count = 0
    numOfHosts: Annotated[int, Strict(), Field(ge=1)] = 1
    priority: Annotated[int, Strict()] | None = None
    idleTimeoutSeconds: Count | None = None
    rayStartParams: Map = {}
    labels: Map = {}
    resources: Map = {}
    scaleStrategy: ScaleStrategy | None = None
    suspend: Flag | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError(f"replicas={self.replicas} is not within {self.minReplicas}..{self.maxReplicas}")
        return self


class ClusterUpgrade(_Fields):
    type: Literal["Recreate", "None"]


class RayClusterSpec(_Fields):
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = []
    rayVersion: Text | None = None
    authOptions: AuthOptions | None = None
    enableInTreeAutoscaling: Flag = False
    autoscalerOptions: AutoscalerOptions | None = None
    headServiceAnnotations: Map = {}
    upgradeStrategy: ClusterUpgrade | None = None
    ttlSecondsAfterIdle: Count | None = None
    managedBy: Literal["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"] | None = None
    suspend: Flag | None = None

    @model_validator(mode="after")
    def _as_the_operator_asks(self) -> Self:
        names = [group.groupName for group in self.workerGroupSpecs]
        if len(set(names)) != len(names):
            raise ValueError(f"groupName twice in {names}")
        v2 = self.enableInTreeAutoscaling and self.autoscalerOptions and self.autoscalerOptions.version == "v2"
        for group in self.workerGroupSpecs:
            if not v2 and (group.priority is not None or group.idleTimeoutSeconds is not None):
                raise ValueError(f"{group.groupName}: priority and idleTimeoutSeconds are for autoscaler v2")
        return self


class DeletionCondition(_Fields):
    jobStatus: Literal["SUCCEEDED", "FAILED"] | None = None
    jobDeploymentStatus: Literal["Failed"] | None = None
    ttlSeconds: Count = 0

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.jobStatus is None) == (self.jobDeploymentStatus is None):
            raise ValueError("exactly one of jobStatus and jobDeploymentStatus")
        return self


class DeletionRule(_Fields):
    policy: Literal["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]
    condition: DeletionCondition


class DeletionStrategy(_Fields):
    deletionRules: list[DeletionRule] = Field(min_length=1)


class SubmitterConfig(_Fields):
    backoffLimit: Count | None = None


class RayJobSpec(_Fields):
    entrypoint: Text | None = None
    rayClusterSpec: RayClusterSpec | None = None
    clusterSelector: Map = {}
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    submitterPodTemplate: PodTemplate | None = None
    submitterConfig: SubmitterConfig | None = None
    runtimeEnvYAML: Text | None = None
    metadata: Map = {}
    jobId: Text | None = None
    entrypointNumCpus: float | None = None
    entrypointNumGpus: float | None = None
    entrypointResources: Text | None = None
    backoffLimit: Count = 0
    activeDeadlineSeconds: Annotated[int, Strict(), Field(ge=1)] | None = None
    shutdownAfterJobFinishes: Flag = False
    ttlSecondsAfterFinished: Count = 0
    deletionStrategy: DeletionStrategy | None = None
    managedBy: Literal["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"] | None = None
    suspend: Flag = False

    @model_validator(mode="after")
    def _as_the_operator_asks(self) -> Self:
        if not self.rayClusterSpec and not self.clusterSelector:
            raise ValueError("neither rayClusterSpec nor clusterSelector")
        policies = {rule.policy for rule in self.deletionStrategy.deletionRules} if self.deletionStrategy else set()
        if policies and (self.shutdownAfterJobFinishes or self.ttlSecondsAfterFinished):
            raise ValueError("deletionRules with shutdownAfterJobFinishes or ttlSecondsAfterFinished")
        if "DeleteWorkers" in policies and self.rayClusterSpec and self.rayClusterSpec.enableInTreeAutoscaling:
            raise ValueError("DeleteWorkers does not go with enableInTreeAutoscaling")
        return self


class ServiceUpgradeOptions(_Fields):
    gatewayClassName: Text
    stepSizePercent: Annotated[int, Field(ge=0, le=100)]
    intervalSeconds: Count
    maxSurgePercent: Annotated[int, Field(ge=0, le=100)] = 100


class ServiceUpgrade(_Fields):
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]
    clusterUpgradeOptions: ServiceUpgradeOptions | None = None


class RayServiceSpec(_Fields):
    rayClusterConfig: RayClusterSpec
    serveConfigV2: Text
    serveService: Service | None = None
    upgradeStrategy: ServiceUpgrade | None = None
    excludeHeadPodFromServeSvc: Flag | None = None


class RayCluster(_Fields):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: RayClusterSpec

    @property
    def cluster(self) -> RayClusterSpec:
        """The cluster in it."""
        return self.spec


class RayJob(_Fields):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec

    @property
    def cluster(self) -> RayClusterSpec:
        """The cluster in it."""
        assert self.spec.rayClusterSpec is not None
        return self.spec.rayClusterSpec


class RayService(_Fields):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec

    @property
    def cluster(self) -> RayClusterSpec:
        """The cluster in it."""
        return self.spec.rayClusterConfig


KINDS: dict[str, type[RayCluster | RayJob | RayService]] = {
    "raycluster": RayCluster,
    "rayjob": RayJob,
    "rayservice": RayService,
}
