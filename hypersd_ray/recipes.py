"""Recipes: typed functions that return a run's configuration. A new method or base model is a new function here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from hypersd_ray.config.data import DataConfig, EncoderPool
from hypersd_ray.config.feedback import FeedbackConfig, ReFLConfig, StructureConfig
from hypersd_ray.config.onestep import DMDConfig, OneStepConfig
from hypersd_ray.config.rewards import PerceptionConfig, PlacementConfig, RewardConfig
from hypersd_ray.config.tscd import AdversarialConfig, DistillConfig, LoRAConfig, OptimConfig, RunConfig, TSCDConfig
from hypersd_ray.embedded import paths

Mode = Literal["unified", "dedicated"]

TINY_PROMPTS = (
    "a noto penguin on a yellow background",
    "a twemoji red apple on a sky background",
    "a noto pizza on a blue background",
    "a twemoji cat face on a purple background",
    "a noto cactus on a pink background",
    "a twemoji sailboat on a white background",
    "a noto tropical fish on a teal background",
    "a noto strawberry and a noto lemon on a white background",
)


def keeping_guidance(config: TSCDConfig) -> TSCDConfig:
    """The same run with the teacher unguided and a tenth of the captions emptied, at k = 8 alone: guidance and negative
    prompts work when the LoRA samples (the paper's limitation, Sec. 6)."""
    d = config.distill
    update = {
        "k_list": d.k_list[:1], "n_list": d.n_list[:1], "steps_list": (sum(d.steps_list),),
        "omega_min": 1.0, "omega_max": 1.0, "empty_prompts": 0.1,
    }  # fmt: skip
    run = config.run.model_copy(update={"name": f"{config.run.name}-keep-cfg"})
    return config.model_copy(update={"distill": d.model_copy(update=update), "run": run})


def tiny(budget: Literal["minutes", "full"] = "minutes", keep_cfg: bool = False) -> TSCDConfig:
    """The embedded model, on a CPU: "minutes" is a first look, "full" the recipe of the committed LoRAs (half an hour on two free cores)."""
    full = budget == "full"
    config = TSCDConfig(
        teacher=str(paths.TEACHER),
        data=DataConfig(
            shards=str(paths.DATA / "train-*.tar"),
            resolution=32,
            cache="disk",
            encoder=EncoderPool(batch_size=64),
        ),
        distill=DistillConfig(
            steps_list=(1200, 1000, 1200, 1600) if full else (160, 160, 160, 160),
            omega_min=2,
            omega_max=4,
            perturbation=0.0,
        ),
        adversarial=AdversarialConfig(adv_end=0.0, mse_end=1.0),
        lora=LoRAConfig(rank=32),
        optim=OptimConfig(lr=1e-3, schedule="cosine", warmup=20, batch=32),
        run=RunConfig(name=f"tiny-{budget}", checkpoint_every=200, log_every=10, prompts=TINY_PROMPTS),
    )
    return keeping_guidance(config) if keep_cfg else config


def sd15(teacher: str, shards: str = "data/*.tar", keep_cfg: bool = False) -> TSCDConfig:
    """Stable Diffusion 1.5 at 512 px with the paper's settings (batch 512, lr 1e-6, k = 8, 4, 2, 1) on 8 GPUs."""
    config = TSCDConfig(
        teacher=teacher,
        data=DataConfig(
            shards=shards, resolution=512, encoder=EncoderPool(num_gpus=0.25, max_size=4, dtype="bfloat16")
        ),
        distill=DistillConfig(omega_min=3, omega_max=8),
        optim=OptimConfig(lr=1e-6, batch=512, accumulation=4),
        run=RunConfig(name="sd15", workers=8, gpus_per_worker=1, precision="bf16"),
    )
    return keeping_guidance(config) if keep_cfg else config


def sdxl(teacher: str, shards: str = "data/*.tar", keep_cfg: bool = False) -> TSCDConfig:
    """SDXL at 1024 px with the paper's settings on 32 GPUs."""
    config = TSCDConfig(
        teacher=teacher,
        data=DataConfig(
            shards=shards,
            resolution=1024,
            encoder=EncoderPool(num_gpus=0.5, max_size=8, batch_size=8, dtype="bfloat16"),
        ),
        distill=DistillConfig(omega_min=5, omega_max=8),
        optim=OptimConfig(lr=1e-6, batch=512, accumulation=4),
        run=RunConfig(name="sdxl", workers=32, gpus_per_worker=1, precision="bf16"),
    )
    return keeping_guidance(config) if keep_cfg else config


def onestep_tiny(init: str, mode: Mode = "unified", budget: Literal["minutes", "full"] = "minutes") -> OneStepConfig:
    """The embedded model, on a CPU, from the LoRA of `jobs/tscd.py tiny`: minutes, or "full" for the committed one."""
    base, steps = tiny(), 4000 if budget == "full" else 400
    return OneStepConfig(
        teacher=base.teacher,
        init=init,
        mode=mode,
        data=base.data,
        distill=DistillConfig(
            k_list=(1,), n_list=(40,), steps_list=(steps,), omega_min=2, omega_max=4, perturbation=0.0
        ),
        dmd=DMDConfig(guidance=3.0, fake_updates=3, fake_lr=1e-3),
        lora=base.lora,
        optim=OptimConfig(lr=2e-4, schedule="cosine", warmup=20, batch=32),
        run=RunConfig(name=f"tiny-onestep-{mode}", checkpoint_every=100, log_every=10, prompts=TINY_PROMPTS),
    )


def onestep_sd15(teacher: str, init: str, shards: str = "data/*.tar", mode: Mode = "unified") -> OneStepConfig:
    """Stable Diffusion 1.5 from a TSCD LoRA on 8 GPUs; what the paper leaves open as DMD2 has it."""
    base = sd15(teacher, shards)
    return OneStepConfig(
        teacher=teacher,
        init=init,
        mode=mode,
        data=base.data,
        distill=DistillConfig(k_list=(1,), n_list=(40,), steps_list=(10_000,), omega_min=3, omega_max=8),
        dmd=DMDConfig(guidance=1.75, fake_updates=10),
        lora=base.lora,
        optim=OptimConfig(lr=1e-6, batch=512, accumulation=4, clip=10.0),
        run=base.run.model_copy(update={"name": f"sd15-onestep-{mode}"}),
    )


def onestep_sdxl(teacher: str, init: str, shards: str = "data/*.tar", mode: Mode = "unified") -> OneStepConfig:
    """SDXL at 1024 px from a TSCD LoRA on 32 GPUs; what the paper leaves open as DMD2 has it."""
    base = sdxl(teacher, shards)
    return OneStepConfig(
        teacher=teacher,
        init=init,
        mode=mode,
        data=base.data,
        distill=DistillConfig(k_list=(1,), n_list=(40,), steps_list=(10_000,), omega_min=5, omega_max=8),
        dmd=DMDConfig(guidance=8.0, fake_updates=5),
        lora=base.lora,
        optim=OptimConfig(lr=1e-6, batch=512, accumulation=8, clip=10.0),
        run=base.run.model_copy(update={"name": f"sdxl-onestep-{mode}"}),
    )


def feedback_tiny(lora: str, learn: Literal["both", "reward", "structure"] = "both") -> FeedbackConfig:
    """The embedded model, on a CPU, above the LoRA of `jobs/tscd.py tiny`: rewards, the structure loss, or both."""
    base, judges = tiny(), paths.EVALUATORS
    clip = str(judges / "clip")
    return FeedbackConfig(
        teacher=base.teacher,
        tscd=lora,
        data=base.data,
        steps=300,
        rewards=(
            RewardConfig(name="aesthetic_v2", checkpoint=str(judges / "aesthetic.safetensors"), tower=clip, alpha=9.0),
            RewardConfig(name="clip_score", checkpoint=clip, role="watch"),
        ),
        refl=ReFLConfig(weight=0.0 if learn == "structure" else 0.1),
        structure=StructureConfig(
            weight=0.0 if learn == "reward" else 0.1,
            model=PerceptionConfig(checkpoint=str(judges / "solo")),
            annotations=str(paths.DATA / "instances_train.json"),
        ),
        placement=PlacementConfig(num_cpus=0),
        decode_batch=32,
        lora=base.lora,
        optim=OptimConfig(lr=2e-4, schedule="cosine", warmup=20, batch=32),
        run=RunConfig(name=f"tiny-feedback-{learn}", checkpoint_every=100, log_every=10, prompts=TINY_PROMPTS),
    )


def _published_rewards(models: str) -> tuple[RewardConfig, ...]:
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
            name="image_reward",
            checkpoint=f"{folder}/ImageReward.pt",
            tokenizer=f"{folder}/bert-base-uncased-vocab.txt",
            alpha=2.0,
        ),
        RewardConfig(name="clip_score", checkpoint=f"{folder}/open_clip_vit_b_32_openai.safetensors", role="watch"),
    )


def feedback_sd15(teacher: str, lora: str, models: str, shards: str = "data/*.tar") -> FeedbackConfig:
    """Stable Diffusion 1.5 above a TSCD LoRA on 8 GPUs; `models` is the folder of the reward models' and SOLO's files."""
    base = sd15(teacher, shards)
    return FeedbackConfig(
        teacher=teacher,
        tscd=lora,
        data=base.data,
        steps=5000,
        rewards=_published_rewards(models),
        structure=StructureConfig(model=PerceptionConfig(checkpoint=f"{models.rstrip('/')}/solo_r50_fpn_3x_coco.pth")),
        placement=PlacementConfig(num_gpus=0.25, precision="bf16"),
        decode_batch=2,
        lora=base.lora,
        optim=OptimConfig(lr=1e-6, batch=64, accumulation=4),
        run=base.run.model_copy(update={"name": "sd15-feedback"}),
    )


def feedback_sdxl(teacher: str, lora: str, models: str, shards: str = "data/*.tar") -> FeedbackConfig:
    """SDXL at 1024 px above a TSCD LoRA on 32 GPUs; `models` as for sd15."""
    base, small = sdxl(teacher, shards), feedback_sd15(teacher, lora, models, shards)
    return small.model_copy(
        update={
            "data": base.data,
            "decode_batch": 1,
            "run": base.run.model_copy(update={"name": "sdxl-feedback"}),
            "optim": OptimConfig(lr=1e-6, batch=128, accumulation=4),
        }
    )


RECIPES: dict[str, Callable[..., TSCDConfig]] = {"tiny": tiny, "sd15": sd15, "sdxl": sdxl}
ONESTEP_RECIPES: dict[str, Callable[..., OneStepConfig]] = {
    "tiny": onestep_tiny,
    "sd15": onestep_sd15,
    "sdxl": onestep_sdxl,
}
FEEDBACK_RECIPES: dict[str, Callable[..., FeedbackConfig]] = {
    "tiny": feedback_tiny,
    "sd15": feedback_sd15,
    "sdxl": feedback_sdxl,
}
