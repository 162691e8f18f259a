"""What is found wrong with a one-step run before Ray starts: one line each."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import replace

import pytest
import yaml

from hypersd_ray.config.base import CombinationError
from hypersd_ray.config.data import DataConfig
from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.models.export import save_diffusers_lora
from hypersd_ray.models.lora import Adapters
from hypersd_ray.models.lora_file import LoRAMetadata
from hypersd_ray.trainer import checks, room, run
from tests.helpers.pipelines import build_pipeline, randomize, tiny_unet

METADATA = LoRAMetadata(
    base_model="tiny", family="sd", k=1, steps=(1,), scheduler="TCDScheduler", eta=0.0, rank=4, alpha=4.0
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(teacher folder, LoRA file)."""
    folder = tmp_path_factory.mktemp("parts")
    adapters = Adapters(tiny_unet("sd"), 4, 4.0)
    adapters.add("student", trainable=False)
    lora = save_diffusers_lora(randomize(adapters, "student"), folder / "lora.safetensors", METADATA)
    return build_pipeline("sd", folder / "teacher"), lora


@pytest.fixture
def config(parts, shards, tmp_path) -> OneStepConfig:
    teacher, lora = parts
    return OneStepConfig.model_validate(
        {
            "teacher": str(teacher), "init": str(lora), "data": DataConfig(shards=str(shards)), "lora": {"rank": 4},
            "run": {"name": "a", "out": str(tmp_path)},
        }
    )  # fmt: skip


def changed(config: OneStepConfig, **fields) -> OneStepConfig:
    return OneStepConfig.model_validate(config.model_dump() | fields)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """What is refused is refused before a cluster is asked for."""

    def connect():
        raise AssertionError("the run asked for a cluster")

    monkeypatch.setattr(run, "connect", connect)


def refused(config: TSCDConfig, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        run.train(config)
    assert "\n" not in str(caught.value)


def write_config(config: TSCDConfig, tmp_path) -> None:
    (tmp_path / config.run.name).mkdir()
    (tmp_path / config.run.name / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))


def test_a_run_that_fits_is_not_refused(config, tmp_path):
    checks.check(config)
    write_config(config, tmp_path)
    checks.check(config)  # its own resume


def test_a_lora_of_another_rank(config):
    refused(changed(config, lora={"rank": 8}), r"has rank 4, lora\.rank is 8: set lora\.rank to 4")


def test_a_lora_of_another_family(config, parts, tmp_path):
    adapters = Adapters(tiny_unet("sdxl"), 4, 4.0)
    adapters.add("student", trainable=False)
    path = save_diffusers_lora(
        randomize(adapters, "student"), tmp_path / "xl.safetensors", replace(METADATA, family="sdxl")
    )
    refused(changed(config, init=str(path)), r"is a LoRA for sdxl .*, teacher=.* is sd")


def test_a_lora_that_is_none(config, tmp_path):
    (tmp_path / "x.safetensors").write_text("no LoRA")
    refused(changed(config, init=str(tmp_path / "x.safetensors")), "not a safetensors file")


def test_a_folder_that_holds_a_tscd_run(config, tmp_path):
    fields = {name: value for name, value in config.model_dump().items() if name in TSCDConfig.model_fields}
    write_config(TSCDConfig.model_validate(fields | {"distill": {}}), tmp_path)
    refused(config, r"holds another kind of run: set run\.name")


def test_a_tscd_run_in_a_folder_that_holds_a_one_step_run(config, tmp_path):
    write_config(config, tmp_path)
    fields = {name: value for name, value in config.model_dump().items() if name in TSCDConfig.model_fields}
    refused(TSCDConfig.model_validate(fields | {"distill": {}}), r"holds another kind of run: set run\.name")


@pytest.mark.parametrize("field", [{"mode": "dedicated"}, {"dmd": {"fake_updates": 2}}])
def test_a_resume_with_another_fake_score_or_mode(config, tmp_path, field):
    write_config(config, tmp_path)
    refused(changed(config, **field), f"{next(iter(field))} differs from the run that is in .*; set run.name")


def test_pairs_that_are_none(config, tmp_path):
    refused(changed(config, regression={"pairs": str(tmp_path), "batch": 32}), r"regression\.pairs=.* holds no pairs")


def test_a_clip_that_is_not_there(config):
    refused(
        changed(config, measure={"prompts": ("a cat", "a dog"), "clip": "/nowhere"}),
        r"measure\.clip=/nowhere does not exist",
    )


def test_bf16_without_a_gpu(config):
    refused(changed(config, run=config.run.model_dump() | {"precision": "bf16"}), "bf16 is for GPUs")


def test_zero_without_deepspeed(config, monkeypatch):
    sharded = changed(config, full_unet=True, zero={"stage": 2}, lora={"rank": 8})  # what is merged may have any rank
    checks.check(sharded)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.18.1")
    refused(sharded, r"zero\.stage=2 needs DeepSpeed 0\.19\.8 or newer, it is 0\.18\.1: pip install")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(sharded, r"it is not there: pip install 'hypersd-ray\[zero\]', or set zero\.stage=0")


def test_a_reward_that_is_not_there(config):
    gone = {"name": "clip_score", "checkpoint": "/nowhere/clip"}
    said = r"feedback\.rewards\.clip_score\.checkpoint=/nowhere/clip does not exist"
    refused(changed(config, feedback={"rewards": (gone,)}), said)
    with pytest.raises(CombinationError, match="clip_score twice"):
        changed(config, feedback={"rewards": (gone, gone)})


@pytest.mark.parametrize("change", [{"full_unet": True}, {"init": "other"}])
def test_a_fake_score_of_another_run(config, parts, tmp_path, change):
    """What its checkpoints hold was trained beside another student."""
    write_config(config, tmp_path)
    other = tmp_path / "other.safetensors"
    other.write_bytes(parts[1].read_bytes())
    refused(
        changed(config, **change | ({"init": str(other)} if "init" in change else {})),
        "differs from the run that is in",
    )


@pytest.mark.parametrize(
    ("have", "most", "autoscaling", "said"),
    [
        (
            {"CPU": 4.0},
            None,
            "",
            r"run\.workers=9 with run\.cpus_per_worker=1 and 1\.5 for each .* need 22\.5 CPU, the cluster has 4: lower run\.workers or",
        ),
        (
            {"CPU": 4.0},
            {"CPU": 8.0},
            "1",
            r"need 22\.5 CPU, the cluster's autoscaler adds nodes up to 8: lower run\.workers",
        ),
        ({"CPU": 4.0}, {"CPU": 22.5}, "1", None),
        ({"CPU": 22.5}, {"CPU": 0.0}, "", None),
        ({"CPU": 4.0}, None, "1", None),
    ],
)
def test_more_workers_than_there_will_ever_be(config, monkeypatch, have, most, autoscaling, said):
    monkeypatch.setattr(room.ray, "cluster_resources", lambda: have)
    monkeypatch.setattr(room, "most_there_will_be", lambda: most)
    monkeypatch.setattr(checks, "await_places", lambda *_: None)
    monkeypatch.setattr(checks.elastic, "nodes_now", lambda: [have])
    monkeypatch.setenv("RAY_AUTOSCALING", autoscaling)
    nine = changed(config, run=config.run.model_dump() | {"workers": 9}, optim={"batch": 27})
    if said is None:
        checks.check_resources(nine)
    else:
        with pytest.raises(ValueError, match=said):
            checks.check_resources(nine)
