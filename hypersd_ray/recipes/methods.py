"""Every method of the paper's comparison for the embedded model, with one budget: what a comparison calls.

    chain = METHODS["lcm"](budget=9_600, lr=1e-3, seed=0)
    config = chain.first                    # train it, then for each of chain.then:
    config = link.config(path_of_its_lora)  # ... the next configuration, from the LoRA of run link.above

A budget is images through the teacher: training rows, each of which the teacher sees at least once, over all stages and
parts of a chain that ask it. How often it sees one is the method's own affair and in `teacher_passes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hypersd_ray.config.feedback import FeedbackConfig
from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.recipes.feedback import feedback_tiny
from hypersd_ray.recipes.onestep import Few, few_step, onestep_tiny
from hypersd_ray.recipes.trajectory import TRAJECTORIES, Settings, shared
from hypersd_ray.recipes.tscd import TINY_OMEGA, embedded, short_tscd

BUDGET = 9_600
"""Images: 300 steps of 32."""
BATCH = 32
GUIDANCE = sum(TINY_OMEGA) / 2
"""Of the teacher where a method has one scale: the middle of the others' range."""
HYPER_SD = "hyper-sd"
"""The paper's row."""
LADDER = (8, 4, 2, 1)
"""Numbers of steps that have a LoRA of their own."""
FEEDBACK_SHARE = 0.2
"""Steps of feedback, over all of the ladder, beside the budget's."""
LIGHTNING_LR = 1e-3 / 3
"""Its end is adversarial alone: at the others' 1e-3 CLIP score falls from 80 to 28, at three times that to 2."""
LATER_LR = 0.2
"""Learning rate of a chain's later parts, as a share of its first's: they set out from a trained model."""

Config = TSCDConfig | FeedbackConfig


@dataclass(frozen=True)
class Link:
    """A run of a chain that goes on from an earlier one.

    Attributes:
        config: the LoRA file of the run it goes on from -> its configuration.
        above: that run's place in the chain.
        steps: ... and which of its LoRAs: the one for so many steps.
    """

    config: Callable[[str], Config]
    above: int
    steps: int = 1


@dataclass(frozen=True)
class Chain:
    """A run, and the runs that go on from it.

    Attributes:
        first: its configuration.
        then: the later runs.
        serves: number of steps -> place of the run whose model is for it; empty: the last run's for all.
        gamma: whether noise between its sampler's steps is a choice (TCD's gamma); LCM, Turbo and DMD always add it.
    """

    first: Config
    then: tuple[Link, ...] = ()
    serves: dict[int, int] = field(default_factory=dict)
    gamma: bool = False


def run_name(method: str, lr: float, seed: int) -> str:
    """Of a comparison's training."""
    return f"{method}-lr{lr:g}-seed{seed}"


def trajectory(method: str, budget: int = BUDGET, lr: float = 1e-3, seed: int = 0) -> Chain:
    """A method of `hypersd_ray/recipes/trajectory.py`."""
    steps = budget // BATCH
    settings = short_tscd(steps) if method == "tscd" else TRAJECTORIES[method](steps, TINY_OMEGA)
    return of_settings(run_name(method, lr, seed), settings, lr, seed)


def of_settings(name: str, settings: Settings, lr: float, seed: int) -> Chain:
    """One run. A student of jumps to anywhere may be sampled with noise or without; others as they were taught."""
    return Chain(embedded(name, settings, lr, seed), gamma=settings.distill.t_end == "uniform")


def score(method: Few, budget: int = BUDGET, lr: float = 2e-4, seed: int = 0) -> Chain:
    """A four-step model by score distillation; a fake score learns five times as fast as the student."""
    base = embedded(run_name(method, lr, seed), lr=lr, seed=seed)
    return Chain(few_step(method, base, budget // BATCH, GUIDANCE, fake_updates=3, fake_lr=5 * lr))


def hyper(name: str, budget: int = BUDGET, lr: float = 1e-3, seed: int = 0) -> Chain:
    """Hyper-SD and its parts: TSCD, then feedback above the LoRA of each k, each for its own number of steps, then
    distribution matching for the single step, for a fifth of the budget; later parts at a fifth of the rate.

    "tscd-feedback" has the first alone, "hyper-sd" both (paper, Sec. 4.1), its single step by the dedicated model (T = 800,
    Sec. 3.3), which has no other steps to keep and its recipe's own rate; "tscd-dmd" is the unified LoRA of 1 to 8 steps
    above k = 1. Feedback asks no teacher, so its images are beside the budget. Chains that begin alike share the run.
    """
    feedback, dmd = name != "tscd-dmd", name != "tscd-feedback"
    whole = budget // BATCH
    tscd_steps, dmd_steps = shared(whole, (4, 1)) if dmd else (whole, 0)
    begins = run_name("tscd-short" if dmd else "tscd", lr, seed)
    first = embedded(begins, short_tscd(tscd_steps), lr, seed)
    if not feedback:
        return Chain(first, (Link(partial(_unified, first, dmd_steps), 0),), gamma=True)
    each = shared(max(len(LADDER), round(FEEDBACK_SHARE * whole)), [1] * len(LADDER))
    then = [Link(partial(_feedback, first, n, k), 0, k) for k, n in zip(LADDER, each, strict=True)]
    serves = {k: 1 + i for i, k in enumerate(LADDER)}
    if dmd:
        then.append(Link(partial(_dedicated, first, dmd_steps), serves[1]))
        serves |= {1: len(then)}
    return Chain(first, tuple(then), serves, gamma=True)


def _goes_on(first: TSCDConfig, part: str) -> dict[str, Any]:
    """Optimiser and place of a part that goes on from `first`."""
    return {
        "optim": first.optim.model_copy(update={"lr": LATER_LR * first.optim.lr}),
        "run": first.run.model_copy(update={"name": f"{first.run.name}-{part}"}),
    }


def _feedback(first: TSCDConfig, steps: int, k: int, lora: str) -> FeedbackConfig:
    config = feedback_tiny(lora)
    later = _goes_on(first, f"feedback-k{k}")
    later["optim"] = later["optim"].model_copy(update={"warmup": min(first.optim.warmup, steps // 5)})
    return config.model_copy(update={"steps": steps, "refl": config.refl.model_copy(update={"steps": (k,)})} | later)


def _unified(first: TSCDConfig, steps: int, lora: str) -> OneStepConfig:
    config = _one_step(onestep_tiny(lora), steps, first.lora.rank)
    return config.model_copy(update=_goes_on(first, "dmd"))


def _dedicated(first: TSCDConfig, steps: int, lora: str) -> OneStepConfig:
    merged_rank = 2 * first.lora.rank  # TSCD's LoRA and the feedback's
    config = _one_step(onestep_tiny(lora, "dedicated"), steps, merged_rank)
    return config.model_copy(update={"run": _goes_on(first, "feedback-t800")["run"]})


def _one_step(config: OneStepConfig, steps: int, rank: int) -> OneStepConfig:
    distill = config.distill.model_copy(update={"steps_list": (steps,)})
    return config.model_copy(update={"distill": distill, "lora": config.lora.model_copy(update={"rank": rank})})


def teacher_passes(config: Config) -> int:
    """How often the teacher denoises an image in all; guidance's two calls are one, a discriminator's features none."""
    if isinstance(config, FeedbackConfig):
        return 0
    batch, distill = config.optim.batch, config.distill
    solver = [distill.solver_steps(i) if distill.target == "teacher" else 1 for i in range(config.stages)]
    if isinstance(config, OneStepConfig):
        judged = batch if config.dmd.weight else config.consistency_rows(batch)
        return judged * sum(distill.steps_list)
    return batch * sum(n * steps for n, steps in zip(solver, distill.steps_list, strict=True))


METHODS: dict[str, Callable[..., Chain]] = {
    "lcm": partial(trajectory, "lcm"),
    "tcd": partial(trajectory, "tcd"),
    "perflow": partial(trajectory, "perflow"),
    "pd": partial(trajectory, "pd"),
    "lightning": partial(trajectory, "lightning", lr=LIGHTNING_LR),
    "turbo": partial(score, "turbo"),
    "dmd": partial(score, "dmd"),
    "tscd": partial(trajectory, "tscd"),
    "tscd-feedback": partial(hyper, "tscd-feedback"),
    "tscd-dmd": partial(hyper, "tscd-dmd"),
    HYPER_SD: partial(hyper, HYPER_SD),
}
"""name -> (budget=, lr=, seed=) -> the runs. The last four are the paper's own, part by part; the last is its row."""
