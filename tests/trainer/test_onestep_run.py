"""A dedicated one-step run under Ray Train, with pairs that Ray Data made: what comes out is what was trained."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import UNet2DConditionModel

from hypersd_ray.config.data import ActorPool, DataConfig
from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.config.pairs import OdePairsConfig
from hypersd_ray.embedded import paths
from hypersd_ray.models.cards import UNetSampling, read_sampling
from hypersd_ray.models.checkpoint import load_unet, read_base
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.encoders import load_encoders
from hypersd_ray.models.export import merge_lora, save_diffusers_lora
from hypersd_ray.models.lora import Adapters
from hypersd_ray.models.lora_file import LoRAMetadata, read_lora
from hypersd_ray.models.roles import Plain
from hypersd_ray.recipes.feedback import embedded_rewards
from hypersd_ray.trainer import run
from hypersd_ray.trainer.pairs import make_pairs, pair_folder
from hypersd_ray.training import samples
from tests.helpers.pipelines import build_pipeline, micro_unet, randomize
from tests.trainer.conftest import data_config

pytestmark = pytest.mark.cluster
METADATA = LoRAMetadata(
    base_model="micro", family="sd", k=1, steps=(1,), scheduler="TCDScheduler", eta=0.0, rank=4, alpha=4.0
)


@pytest.fixture(scope="module")
def place(cluster, tmp_path_factory):
    """A folder with a teacher and a LoRA, beside a running Ray."""
    folder = tmp_path_factory.mktemp("onestep")
    build_pipeline("sd", folder / "teacher", micro=True)
    adapters = Adapters(micro_unet(), 4, 4.0)
    adapters.add("student", trainable=False)
    save_diffusers_lora(randomize(adapters, "student", size=0.02), folder / "lora.safetensors", METADATA)
    return folder


@pytest.fixture(scope="module")
def data() -> DataConfig:
    return DataConfig(
        shards=str(paths.DATA / "val-00001.tar"), resolution=64, encoder=ActorPool(batch_size=64, num_cpus=0.5)
    )


@pytest.fixture(scope="module")
def pairs(place, data) -> OdePairsConfig:
    config = OdePairsConfig(
        teacher=str(place / "teacher"), out=str(place / "pairs"), data=data, steps=2, omega=2.0, seed=7
    )
    made = make_pairs(config)
    assert (made.files, made.files_skipped) == (1, 0) and made.rows > 50
    return config


def test_pairs_are_the_ends_of_the_teachers_ode(pairs):
    (url,), how = pair_folder(pairs.out, pairs.teacher)
    assert (how["seed"], how["steps"], how["omega"]) == (7, 2, 2.0)
    table = pq.read_table(url).slice(0, 3)
    latents, embeds = (
        torch.from_numpy(np.stack(table[name].combine_chunks().to_numpy(zero_copy_only=False)).astype(np.float32))
        for name in ("latents", "prompt_embeds")
    )
    info = read_base(pairs.teacher)
    roles = Plain(load_unet(info, torch.float32, "cpu"), info.schedule, info.parameterization)
    null = load_encoders(pairs.teacher, vae=False).null_conditioning()
    x_T = samples.start_noise(7, table["key"].to_pylist(), (4, 8, 8))
    ends = samples.teacher_samples(roles, x_T, Conditioning(embeds), null, 2, 2.0)
    torch.testing.assert_close(latents.view_as(ends), ends, rtol=2e-3, atol=2e-2)  # float16 in the file
    again = make_pairs(pairs)
    assert (again.files_skipped, again.rows) == (1, 0)


def test_pairs_of_another_solver_or_teacher_are_refused(pairs, place):
    with pytest.raises(ValueError, match="name another folder"):
        make_pairs(pairs.model_copy(update={"omega": 3.0}))
    build_pipeline("sd", place / "other", seed=1, micro=True)
    with pytest.raises(ValueError, match=r"regression\.pairs=.* was made by .*, not by teacher="):
        pair_folder(pairs.out, str(place / "other"))


def test_a_dedicated_run_ends_in_a_lora_and_a_unet(pairs, place, data):
    config = OneStepConfig.model_validate(
        {
            "teacher": pairs.teacher, "init": str(place / "lora.safetensors"), "data": data, "mode": "dedicated",
            "distill": {"k_list": (1,), "n_list": (20,), "steps_list": (4,)},
            "dmd": {"fake_updates": 1, "warmup_share": 0.0}, "lora": {"rank": 4, "alpha": 8.0},
            "regression": {"pairs": pairs.out, "batch": 4}, "optim": {"lr": 1e-3, "batch": 4},
            "run": {"name": "t800", "out": str(place), "checkpoint_every": 2, "log_every": 1, "prompts": ("a cat",)},
        }
    )  # fmt: skip
    result = run.train(config)
    assert result.metrics["stage"] == 1 and result.metrics["skipped"] == 0
    rows = [json.loads(line) for line in (place / "t800" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"dmd", "fake_score", "regression", "grad_norm"} <= rows[-1].keys() and "consistency" not in rows[-1]

    tensors, metadata = read_lora(place / "t800" / "lora" / "onestep-t800.safetensors")
    assert metadata.scheduler == "LCMScheduler" and metadata.extra == {"timestep": "800"} and metadata.alpha == 8.0
    before = read_lora(config.init)[0]
    assert all(not torch.equal(tensors[n], before[n]) for n in tensors if n.endswith("lora_A.weight"))
    merged = load_unet(read_base(config.teacher), torch.float32, "cpu")
    merge_lora(merged, tensors, 8.0)
    saved = UNet2DConditionModel.from_pretrained(place / "t800" / "unet-onestep-t800").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in merged.state_dict().items())
    assert "timesteps=[800]" in (place / "t800" / "unet-onestep-t800" / "README.md").read_text()
    assert (place / "t800" / "lora" / "onestep-t800-kohya.safetensors").is_file()

    again = run.train(config)  # finished: nothing is left to do, and the report is the same
    assert again.metrics["stage"] == 1
    assert len((place / "t800" / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_full_unet_of_one_step_comes_out_of_two_workers_under_zero_and_a_reward(place, teacher, latents):
    config = OneStepConfig.model_validate(
        {
            "teacher": str(teacher), "init": str(place / "lora.safetensors"), "data": data_config(latents),
            "mode": "dedicated", "full_unet": True, "zero": {"stage": 2, "bucket": 20_000},
            "dmd": {"fake_updates": 1, "warmup_share": 0.0},
            "distill": {"k_list": (1,), "n_list": (20,), "steps_list": (2,)}, "optim": {"lr": 1e-5, "batch": 4},
            "feedback": {"rewards": embedded_rewards()[:1]},
            "run": {"name": "full", "out": str(place), "workers": 2, "log_every": 1, "prompts": ("a cat",)},
        }
    )  # fmt: skip
    result = run.train(config)
    assert result.metrics["stage"] == 1 and result.metrics["skipped"] == 0
    rows = [json.loads(line) for line in (place / "full" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all({"dmd", "aes", "reward/aesthetic_v2"} <= row.keys() for row in rows)
    folder = place / "full" / "unet-onestep-t800"
    made = UNet2DConditionModel.from_pretrained(folder).state_dict()
    begun = load_unet(read_base(config.teacher), torch.float32, "cpu")
    merge_lora(begun, read_lora(config.init)[0], read_lora(config.init)[1].alpha)
    apart = {name: float((made[name] - t).abs().max()) for name, t in begun.state_dict().items()}
    assert made.keys() == apart.keys() and 0 < max(apart.values()) < 1e-4  # two steps of 1e-5 from the TSCD model
    assert read_sampling(folder) == UNetSampling("LCMScheduler", (800,))
    card = (folder / "README.md").read_text()
    assert str(folder) in card and "LCMScheduler" in card and "timesteps=[800]" in card
