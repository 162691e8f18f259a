"""Recipes of trajectory distillation: a base model, and a method of `hypersd_ray/recipes/trajectory.py` on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.data import ActorPool, DataConfig
from hypersd_ray.config.run import OptimConfig, RunConfig
from hypersd_ray.config.tscd import LoRAConfig, TSCDConfig
from hypersd_ray.embedded import paths
from hypersd_ray.recipes import trajectory
from hypersd_ray.recipes.trajectory import TRAJECTORIES, Settings, Trajectory

TINY_OMEGA = (2.0, 4.0)
"""Guidance scales of the embedded teacher."""
FULL_SHARES = (8, 6, 6, 8)
"""The stages' shares of the steps in the committed LoRAs: longer where guidance is learnt, and where one step is."""

SHORT_SHARES = (1, 1, 2, 6)
"""... of a few hundred steps: most of them where the jumps are longest."""
SHORT_N = 16
"""Solver steps of such a stage: what an end of a segment says has fewer of them to pass through."""

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


def embedded(name: str, settings: Settings | None = None, lr: float = 1e-3, seed: int = 0) -> TSCDConfig:
    """The embedded model by any method (None: TSCD for minutes), on a CPU: LoRA of rank 32, batch 32."""
    settings = settings or embedded_tscd(640)
    # Heads that begin anew need more than the paper's rate in minutes.
    adversarial = settings.adversarial.model_copy(update={"lr": 1e-3} if settings.adversarial.adv_end else {})
    return TSCDConfig(
        teacher=str(paths.TEACHER),
        data=DataConfig(
            shards=str(paths.DATA / "train-*.tar"),
            resolution=32,
            cache="disk",
            encoder=ActorPool(batch_size=64),
        ),
        distill=settings.distill,
        adversarial=adversarial,
        lora=LoRAConfig(rank=32),
        # A stage of a few dozen steps must not be all warm-up.
        optim=OptimConfig(lr=lr, schedule="cosine", warmup=min(20, min(settings.distill.steps_list) // 5), batch=32),
        run=RunConfig(name=name, seed=seed, checkpoint_every=200, log_every=10, prompts=TINY_PROMPTS),
    )


def embedded_tscd(steps: int, shares: Sequence[float] = (1, 1, 1, 1)) -> Settings:
    """TSCD for the embedded model: without adversarial loss and noise perturbation."""
    distill = trajectory.tscd(steps, TINY_OMEGA, shares).distill
    return Settings(distill.model_copy(update={"perturbation": 0.0}))


def short_tscd(steps: int) -> Settings:
    """TSCD for the embedded model in a few hundred steps. Each stage's teacher is the student before (Fig. 2 reads so): what
    is learnt already is not asked of the base again."""
    settings = embedded_tscd(steps, SHORT_SHARES)
    return Settings(
        settings.distill.model_copy(update={"n_list": (SHORT_N,) * 4, "teacher": "previous"}), settings.adversarial
    )


def keeping_guidance(config: TSCDConfig) -> TSCDConfig:
    """The same run with the teacher unguided and a tenth of the captions emptied, at its first k alone (TSCD: 8):
    guidance and negative prompts work when the LoRA samples (the paper's limitation, Sec. 6; PeRFlow's CFG-sync).

    Raises:
        ConfigError: the method learns from its own students, which carry guidance.
    """
    d = config.distill
    if d.teacher == "previous":
        raise ConfigError(
            f"keep_cfg with method {d.name}: its later students have guidance in them; use tscd or perflow"
        )
    update = {
        "k_list": d.k_list[:1], "n_list": d.n_list[:1], "steps_list": (sum(d.steps_list),),
        "omega_min": 1.0, "omega_max": 1.0, "empty_prompts": 0.1,
    }  # fmt: skip
    run = config.run.model_copy(update={"name": f"{config.run.name}-keep-cfg"})
    return config.model_copy(update={"distill": d.model_copy(update=update), "run": run})


def tiny(
    budget: Literal["minutes", "full"] = "minutes", method: Trajectory = "tscd", keep_cfg: bool = False
) -> TSCDConfig:
    """The embedded model, on a CPU: "minutes" is a first look, "full" the recipe of the committed LoRAs (an hour on two free cores)."""
    full = budget == "full"
    steps = 7000 if full else 640
    if method == "tscd":
        config = embedded(f"tiny-{budget}", embedded_tscd(steps, FULL_SHARES if full else (1, 1, 1, 1)))
    else:
        config = embedded(f"tiny-{method}-{budget}", TRAJECTORIES[method](steps, TINY_OMEGA))
    return keeping_guidance(config) if keep_cfg else config


def sd15(teacher: str, shards: str = "data/*.tar", method: Trajectory = "tscd", keep_cfg: bool = False) -> TSCDConfig:
    """Stable Diffusion 1.5 at 512 px with the paper's settings (batch 512, lr 1e-6, k = 8, 4, 2, 1) on 8 GPUs, and 2 for
    the encoders where the pictures were not encoded before (jobs/precompute.py)."""
    settings = TRAJECTORIES[method](20_000, (3, 8))
    config = TSCDConfig(
        teacher=teacher,
        data=DataConfig(shards=shards, resolution=512, encoder=ActorPool(num_gpus=0.25, max_size=4, dtype="bfloat16")),
        distill=settings.distill,
        adversarial=settings.adversarial,
        optim=OptimConfig(lr=1e-6, batch=512, accumulation=4),
        run=RunConfig(
            name="sd15" if method == "tscd" else f"sd15-{method}", workers=8, gpus_per_worker=1, precision="bf16"
        ),
    )
    return keeping_guidance(config) if keep_cfg else config


def sdxl(teacher: str, shards: str = "data/*.tar", method: Trajectory = "tscd", keep_cfg: bool = False) -> TSCDConfig:
    """SDXL at 1024 px with the paper's settings on 32 GPUs, and 16 for the encoders (see sd15)."""
    settings = TRAJECTORIES[method](20_000, (5, 8))
    config = TSCDConfig(
        teacher=teacher,
        data=DataConfig(
            shards=shards,
            resolution=1024,
            encoder=ActorPool(num_gpus=0.5, max_size=8, batch_size=8, dtype="bfloat16"),
        ),
        distill=settings.distill,
        adversarial=settings.adversarial,
        optim=OptimConfig(lr=1e-6, batch=512, accumulation=2),
        run=RunConfig(
            name="sdxl" if method == "tscd" else f"sdxl-{method}", workers=32, gpus_per_worker=1, precision="bf16"
        ),
    )
    return keeping_guidance(config) if keep_cfg else config


RECIPES: dict[str, Callable[..., TSCDConfig]] = {"tiny": tiny, "sd15": sd15, "sdxl": sdxl}
