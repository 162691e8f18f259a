"""Recipes of feedback learning (paper, Sec. 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from hypersd_ray.config.feedback import FeedbackConfig, ReFLConfig, StructureConfig
from hypersd_ray.config.rewards import PerceptionConfig, PlacementConfig, RewardConfig
from hypersd_ray.config.run import OptimConfig, RunConfig
from hypersd_ray.embedded import paths
from hypersd_ray.recipes.tscd import TINY_PROMPTS, sd15, sdxl, tiny


def embedded_rewards() -> tuple[RewardConfig, ...]:
    """The embedded world's judges: an aesthetic predictor and an ImageReward to learn from, CLIP score and HPS held out."""
    judges = paths.EVALUATORS
    return (
        RewardConfig(
            name="aesthetic_v2",
            checkpoint=str(judges / "aesthetic.safetensors"),
            tower=str(judges / "clip_large"),
            alpha=10.0,
            weight=0.3,  # at 1.0 CLIP score falls further at 2 and 4 steps, and ImageReward rises less
        ),
        RewardConfig(name="image_reward", checkpoint=str(judges / "image_reward"), alpha=2.0),
        RewardConfig(name="clip_score", checkpoint=str(judges / "clip"), role="watch"),
        RewardConfig(name="hps_v21", checkpoint=str(judges / "hps"), role="watch"),
    )


def feedback_tiny(lora: str, learn: Literal["both", "reward", "structure"] = "both") -> FeedbackConfig:
    """The embedded model, on a CPU, above the LoRA of `jobs/tscd.py tiny`: rewards, the structure loss, or both."""
    base, judges = tiny(), paths.EVALUATORS
    return FeedbackConfig(
        teacher=base.teacher,
        tscd=lora,
        data=base.data,
        steps=120,
        rewards=embedded_rewards(),
        refl=ReFLConfig(weight=0.0 if learn == "structure" else 0.2, t_right=500),
        structure=StructureConfig(
            weight=0.0 if learn == "reward" else 0.5,
            model=PerceptionConfig(checkpoint=str(judges / "solo")),
            annotations=str(paths.DATA / "instances_train.json"),
        ),
        placement=PlacementConfig(num_cpus=0),
        decode_batch=32,
        lora=base.lora,
        optim=OptimConfig(lr=2e-4, schedule="cosine", warmup=20, batch=32),
        run=RunConfig(name=f"tiny-feedback-{learn}", checkpoint_every=100, log_every=10, prompts=TINY_PROMPTS),
    )


ImageRewardBackend = Literal["image_reward", "image_reward_package"]
"""On transformers' classes, or the authors' package in the environment of jobs/image_reward_env.py."""


REFL_LR = 1e-5
"""ReFL's learning rate: the paper names none for feedback."""
SHARE = 0.16
"""Of a GPU, for each of the published rewards and SOLO: six stand on one."""


def published_rewards(models: str, reward: ImageRewardBackend, python: str) -> tuple[RewardConfig, ...]:
    """The paper's choice (Sec. 4.1), and held-out ones, as their authors' files are named, in one folder."""
    folder = models.rstrip("/")
    return (
        RewardConfig(
            name="aesthetic_v2",
            checkpoint=f"{folder}/sac+logos+ava1-l14-linearMSE.pth",
            tower=f"{folder}/open_clip_vit_l_14_openai.safetensors",
            alpha=6.5,
        ),
        RewardConfig(
            name=reward,
            python=python,
            checkpoint=f"{folder}/ImageReward.pt",
            tokenizer=f"{folder}/bert-base-uncased-vocab.txt",
            alpha=2.0,
        ),
        RewardConfig(name="clip_score", checkpoint=f"{folder}/open_clip_vit_b_32_openai.safetensors", role="watch"),
        RewardConfig(name="pick_score", checkpoint=f"{folder}/PickScore_v1", role="watch"),
        RewardConfig(name="hps_v21", checkpoint=f"{folder}/HPS_v2.1_compressed.pt", role="watch"),
    )


def feedback_sd15(
    teacher: str,
    lora: str,
    models: str,
    shards: str = "data/*.tar",
    reward: ImageRewardBackend = "image_reward",
    image_reward_python: str = "",
) -> FeedbackConfig:
    """Stable Diffusion 1.5 above a TSCD LoRA on 8 GPUs, and one for the reward models and SOLO, which share it (and 2 for
    the encoders, as in `recipes.tscd.sd15`); `models` is the folder of the reward models' and SOLO's files."""
    base = sd15(teacher, shards)
    return FeedbackConfig(
        teacher=teacher,
        tscd=lora,
        data=base.data,
        steps=5000,
        rewards=published_rewards(models, reward, image_reward_python),
        structure=StructureConfig(model=PerceptionConfig(checkpoint=f"{models.rstrip('/')}/solo_r50_fpn_3x_coco.pth")),
        placement=PlacementConfig(num_gpus=SHARE, precision="bf16"),
        decode_batch=2,
        lora=base.lora,
        optim=OptimConfig(lr=REFL_LR, batch=64, accumulation=4),
        run=base.run.model_copy(update={"name": "sd15-feedback"}),
    )


def feedback_sdxl(
    teacher: str,
    lora: str,
    models: str,
    shards: str = "data/*.tar",
    reward: ImageRewardBackend = "image_reward",
    image_reward_python: str = "",
) -> FeedbackConfig:
    """SDXL at 1024 px above a TSCD LoRA on 32 GPUs, and one for the reward models and SOLO (and 16 for the encoders);
    `models` and the ImageReward as for sd15."""
    base = sdxl(teacher, shards)
    small = feedback_sd15(teacher, lora, models, shards, reward, image_reward_python)
    return small.model_copy(
        update={
            "data": base.data,
            "decode_batch": 1,
            "run": base.run.model_copy(update={"name": "sdxl-feedback"}),
            "optim": OptimConfig(lr=REFL_LR, batch=128, accumulation=4),
        }
    )


FEEDBACK_RECIPES: dict[str, Callable[..., FeedbackConfig]] = {
    "tiny": feedback_tiny,
    "sd15": feedback_sd15,
    "sdxl": feedback_sdxl,
}
