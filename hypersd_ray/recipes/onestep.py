"""Recipes of one-step enhancement (paper, Sec. 3.3), and of few-step models by score distillation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from hypersd_ray.config.onestep import DMDConfig, OneStepConfig, RegressionConfig, RewardsConfig
from hypersd_ray.config.rewards import PlacementConfig
from hypersd_ray.config.run import OptimConfig, RunConfig
from hypersd_ray.config.tscd import AdversarialConfig, DistillConfig, TSCDConfig
from hypersd_ray.recipes.feedback import SHARE, embedded_rewards, published_rewards
from hypersd_ray.recipes.tscd import TINY_PROMPTS, embedded, sd15, sdxl, tiny

Mode = Literal["unified", "dedicated"]


FULL_LR, LORA_LR, CLIP = 5e-7, 5e-5, 10.0
"""DMD2's learning rates of a whole UNet and of a LoRA, and its clip of the gradient. The paper names a rate for TSCD alone."""


def onestep_tiny(
    init: str,
    mode: Mode = "unified",
    budget: Literal["minutes", "full"] = "minutes",
    full_unet: bool = False,
    feedback: bool = False,
) -> OneStepConfig:
    """The embedded model, on a CPU, from the LoRA of `jobs/tscd.py tiny`: minutes, or "full" for the committed one;
    `feedback` has the aesthetic predictor and the ImageReward judge the single step too."""
    base, steps = tiny(), 4000 if budget == "full" else 400
    learnt = tuple(reward for reward in embedded_rewards() if reward.role == "train")
    lr, fake_lr = (1e-5, 5e-5) if full_unet else (2e-4, 1e-3)  # a step of Adam moves each weight by as much
    return OneStepConfig(
        teacher=base.teacher,
        init=init,
        mode=mode,
        data=base.data,
        distill=DistillConfig(
            k_list=(1,), n_list=(40,), steps_list=(steps,), omega_min=2, omega_max=4, perturbation=0.0
        ),
        dmd=DMDConfig(guidance=3.0, fake_updates=3, fake_lr=fake_lr),
        feedback=RewardsConfig(rewards=learnt if feedback else (), decode_batch=32),
        full_unet=full_unet,
        lora=base.lora,
        optim=OptimConfig(lr=lr, schedule="cosine", warmup=20, batch=32),
        run=RunConfig(name=f"tiny-onestep-{mode}", checkpoint_every=100, log_every=10, prompts=TINY_PROMPTS),
    )


def _published(models: str, decode_batch: int) -> RewardsConfig:
    """The rewards that feedback trains, from their folder; none without one."""
    chosen = [r for r in published_rewards(models, "image_reward", "") if r.role == "train"] if models else []
    placement = PlacementConfig(num_gpus=SHARE, precision="bf16")
    return RewardsConfig(rewards=tuple(chosen), decode_batch=decode_batch, placement=placement)


def onestep_sd15(
    teacher: str, init: str, shards: str = "data/*.tar", mode: Mode = "unified", full_unet: bool = False,
    rewards: str = "",
) -> OneStepConfig:  # fmt: skip
    """Stable Diffusion 1.5 from a TSCD LoRA on 8 GPUs; what the paper leaves open as DMD2 has it. `rewards`: the folder
    of the feedback recipes' reward models, where these are to judge the single step too (a third of a GPU more)."""
    base = sd15(teacher, shards)
    return OneStepConfig(
        teacher=teacher,
        init=init,
        mode=mode,
        data=base.data,
        distill=DistillConfig(k_list=(1,), n_list=(40,), steps_list=(10_000,), omega_min=3, omega_max=8),
        dmd=DMDConfig(guidance=1.75, fake_updates=10),
        feedback=_published(rewards, decode_batch=2),
        full_unet=full_unet,
        lora=base.lora,
        optim=OptimConfig(lr=FULL_LR if full_unet else LORA_LR, batch=512, accumulation=4, clip=CLIP),
        run=base.run.model_copy(update={"name": f"sd15-onestep-{mode}"}),
    )


def onestep_sdxl(
    teacher: str, init: str, shards: str = "data/*.tar", mode: Mode = "unified", full_unet: bool = False,
    rewards: str = "",
) -> OneStepConfig:  # fmt: skip
    """SDXL at 1024 px from a TSCD LoRA on 32 GPUs; what the paper leaves open as DMD2 has it; `rewards` as for
    sd15."""
    base = sdxl(teacher, shards)
    return OneStepConfig(
        teacher=teacher,
        init=init,
        mode=mode,
        data=base.data,
        distill=DistillConfig(k_list=(1,), n_list=(40,), steps_list=(10_000,), omega_min=5, omega_max=8),
        dmd=DMDConfig(guidance=8.0, fake_updates=5),
        regression=RegressionConfig(batch=128),  # a pair in each of the 32 x 4 parts
        feedback=_published(rewards, decode_batch=1),
        full_unet=full_unet,
        lora=base.lora,
        optim=OptimConfig(lr=FULL_LR if full_unet else LORA_LR, batch=512, accumulation=4, clip=CLIP),
        run=base.run.model_copy(update={"name": f"sdxl-onestep-{mode}"}),
    )


Few = Literal["turbo", "dmd"]
STEPS = (999, 749, 499, 249)
"""The network's inputs of Turbo's and DMD2's four steps."""


def few_step(
    method: Few, base: TSCDConfig, steps: int, guidance: float, fake_updates: int, fake_lr: float | None = None
) -> OneStepConfig:
    """A four-step model of the base by score distillation, with `base`'s data, adapter, optimiser and place.

    "turbo": adversarial diffusion distillation (Sauer et al. 2023): noised data in, the discriminator against the data,
    2.5 times the alpha-weighted distance to what the teacher sees. "dmd": distribution matching as DMD2 has it (Yin et
    al. 2024): its own steps in, a fake score, and a little (5e-3) of the discriminator. Both judge latents here.
    """
    turbo, lr = method == "turbo", base.adversarial.lr
    return OneStepConfig(
        teacher=base.teacher,
        data=base.data,
        mode="few",
        timesteps=STEPS,
        inputs="data" if turbo else "generated",
        distill=DistillConfig(
            name=method, k_list=(1,), n_list=(40,), steps_list=(steps,), omega_min=guidance, omega_max=guidance
        ),
        dmd=DMDConfig(weight=2.5, guidance=guidance, measure="add", fake_updates=0, warmup_share=0.0)
        if turbo
        else DMDConfig(guidance=guidance, fake_updates=fake_updates, fake_lr=fake_lr),
        adversarial=AdversarialConfig(kind="hinge", adv_start=1.0, adv_end=1.0, lr=lr)
        if turbo
        else AdversarialConfig(kind="non_saturating", adv_start=5e-3, adv_end=5e-3, lr=lr),
        lora=base.lora,
        optim=base.optim,
        run=base.run,
    )


def few_tiny(method: Few = "turbo", budget: Literal["minutes", "full"] = "minutes") -> OneStepConfig:
    """The embedded model in four steps by score distillation, on a CPU."""
    base = embedded(f"tiny-{method}-{budget}", lr=2e-4)
    return few_step(method, base, 4000 if budget == "full" else 400, guidance=3.0, fake_updates=3, fake_lr=1e-3)


def few_sd15(teacher: str, shards: str = "data/*.tar", method: Few = "turbo") -> OneStepConfig:
    """Stable Diffusion 1.5 in four steps by score distillation, on 8 GPUs; rate and clip as DMD2's LoRA has them."""
    return few_step(method, _placed(sd15(teacher, shards), f"sd15-{method}"), 20_000, guidance=1.75, fake_updates=10)


def few_sdxl(teacher: str, shards: str = "data/*.tar", method: Few = "turbo") -> OneStepConfig:
    """SDXL in four steps by score distillation, on 32 GPUs; rate and clip as for sd15."""
    return few_step(method, _placed(sdxl(teacher, shards), f"sdxl-{method}"), 20_000, guidance=8.0, fake_updates=5)


def _placed(base: TSCDConfig, name: str) -> TSCDConfig:
    """`base` under another name, with DMD2's rate and clip."""
    optim = base.optim.model_copy(update={"lr": LORA_LR, "clip": CLIP})
    return base.model_copy(update={"optim": optim, "run": base.run.model_copy(update={"name": name})})


ONESTEP_RECIPES: dict[str, Callable[..., OneStepConfig]] = {
    "tiny": onestep_tiny,
    "sd15": onestep_sd15,
    "sdxl": onestep_sdxl,
    "few-tiny": few_tiny,
    "few-sd15": few_sd15,
    "few-sdxl": few_sdxl,
}
