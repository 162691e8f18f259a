"""What each worker of a full UNet's training holds, before a weight is loaded, and which way of sharing it out fits.

The states' sizes are what `FullRoles`, `Trained` and `Followed` (models/) and DeepSpeed keep, a line each; the
activations are measured (activations.py). Bytes throughout; P: the UNet's weights, N: workers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode

from hypersd_ray.config.onestep import OneStepConfig
from hypersd_ray.config.tscd import TSCDConfig
from hypersd_ray.config.zero import ZeroConfig
from hypersd_ray.models.discriminator import LatentDiscriminator
from hypersd_ray.models.shards import GATHERED_AT_ONCE, deepspeed_config
from hypersd_ray.training.activations import Shape, judging, learning, looking, shape_of
from hypersd_ray.training.distributed import BUCKET

TEACHER, WEIGHTS, OPTIMIZER, GRADIENTS, EMA, FAKE, BUFFERS, ACTIVATIONS = (
    "teacher", "weights", "optimizer", "gradients", "EMA", "fake score", "buffers", "activations",
)  # fmt: skip
COLUMNS = (TEACHER, WEIGHTS, OPTIMIZER, GRADIENTS, EMA, FAKE, BUFFERS, ACTIVATIONS)


@dataclass(frozen=True)
class Sizes:
    """Of a UNet: numbers in all of its weights, in those that stage 3 keeps whole, in the largest, and in the largest
    block that it gathers at once; of a discriminator on it."""

    all: int
    small: int
    largest: int
    block: int
    heads: int


@dataclass
class Plan:
    """What a worker holds on its GPU and in the CPU's memory, by column; `moved`: bytes that a step sends.

    `learning` buffers stand beside activations, `stepping` ones come after them.
    """

    zero: ZeroConfig
    learning: float = 0.0
    stepping: float = 0.0
    gpu: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COLUMNS, 0.0))
    cpu: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COLUMNS, 0.0))
    moved: float = 0.0

    @property
    def total(self) -> float:
        """On the GPU."""
        return sum(self.gpu.values())

    @property
    def host(self) -> float:
        """In the CPU's memory."""
        return sum(self.cpu.values())


def sizes_of(unet_config: dict[str, Any], zero: ZeroConfig) -> Sizes:
    """Of the UNet of a config.json, made without weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config)
    numbers = [p.numel() for p in unet.parameters()]
    threshold = deepspeed_config(zero, torch.float32, torch.device("cpu"))["zero_optimization"][
        "stage3_param_persistence_threshold"
    ]
    modules: list[Any] = [module for module in unet.modules() if isinstance(module, tuple(GATHERED_AT_ONCE))]
    blocks = [sum(p.numel() for p in module.parameters()) for module in modules]
    with FakeTensorMode():
        heads = sum(p.numel() for p in LatentDiscriminator(dict(unet.config), seed=0).parameters())
    return Sizes(sum(numbers), sum(n for n in numbers if n <= threshold), max(numbers), max(blocks), heads)


@dataclass(frozen=True)
class Work:
    """How often a step calls what: passes of the trained networks with gradient, and all passes of each network, in a
    part of the batch; `peak`: the most that activations take; all per worker."""

    parts: int
    learns: dict[str, int]
    calls: dict[str, int]
    peak: float


def work_of(config: TSCDConfig, workers: int, shape: Shape) -> Work:
    """What a step of `config` does."""
    parts = config.optim.accumulation
    rows = max(1, -(-config.optim.batch // (workers * parts)))
    adversarial = config.adversarial.adv_end > 0 or config.adversarial.adv_start > 0
    guided = 1 if config.distill.omega_max == 1 else 2
    frozen = Shape(shape.config, shape.size, shape.dtype, False, shape.checkpointing, shape.tokens)

    def student(rows: int, meanwhile: int = 0) -> float:
        """A pass that learns; `meanwhile` is held for a moment between forward and backward."""
        one = learning(shape, rows)
        judged = judging(frozen, rows) if adversarial else 0
        return max(one.peak, one.kept + max(meanwhile, judged))

    peaks, learns, calls = [float(looking(frozen, guided * rows))], {"student": 1}, {"teacher": 1, "ema": 1}
    if isinstance(config, OneStepConfig):
        again = config.consistency_rows(rows)
        single, told = rows - again, config.dmd.weight > 0
        real = looking(frozen, single * (1 if config.dmd.guidance == 1 else 2))
        peaks = [student(single, max(real, looking(shape, single)))]
        learns = {"student": 1 + (again > 0)}
        calls = {"teacher": (again > 0) + 1, "ema": int(again > 0), "fake": 0}
        if again:
            peaks += [student(again), looking(frozen, guided * again)]
        if config.regression.pairs is not None:
            peaks.append(student(max(1, config.regression.batch // (workers * parts))))
            learns["student"] += 1
        if told and config.dmd.fake_updates:
            peaks.append(learning(shape, single).peak)
            learns["fake"], calls["fake"] = config.dmd.fake_updates, 1
            calls["student"] = config.dmd.fake_updates
    else:
        peaks.append(student(rows))
    return Work(parts, learns, calls, max(peaks))


def _plain(sizes: Sizes, held: dict[str, int], c: int) -> Plan:
    """ZeRO stage 0: FullRoles and AdamW; float32 but for the teacher."""
    plan, P = Plan(ZeroConfig()), sizes.all
    plan.gpu |= {TEACHER: c * P, WEIGHTS: 4 * P, OPTIMIZER: 8 * P, GRADIENTS: 4 * P, EMA: 4 * P * held[EMA]}
    plan.gpu[FAKE] = 12 * P * held[FAKE]
    plan.stepping = 4 * min(P, BUCKET + sizes.largest)  # a message of gradients
    return plan


def _shared(zero: ZeroConfig, sizes: Sizes, held: dict[str, int], c: int, N: int) -> Plan:
    """ZeRO stages 1 to 3: the engine's tensors for each trained network, and the shares of those that follow."""
    plan, P, stage = Plan(zero), sizes.all, zero.stage
    share, bucket = P / N, min(zero.bucket, P)
    gpu, cpu = plan.gpu, plan.cpu
    optimizer = cpu if zero.offload else gpu
    low = c == 2
    # At rest, of each trained network
    weights = c * P if stage < 3 else c * (share + sizes.small)
    masters_and_moments = 12 * share
    rest_gradients = host_gradients = buffers = host_buffers = 0.0
    if stage == 1 and low and not zero.offload:
        rest_gradients = 4 * P  # BF16_Optimizer's float32 gradients
    if stage == 3:
        if zero.offload:
            host_gradients = 4 * share
        else:
            rest_gradients = 4 * share
        buffers += c * zero.bucket  # that gradients are reduced from
    if zero.offload:
        host_gradients += 4 * share  # of the float32 weights
        if stage < 3:
            host_buffers += c * share + c * sizes.largest
            buffers += c * sizes.largest
            host_gradients += c * share if stage == 2 and not low else 0
    # While one of them learns
    gradients = {
        0: 0.0,
        1: c * P if low and not zero.offload else 4 * P,
        2: (4 if low else 0 if zero.offload else 8) * share,
        3: c * sizes.block,
    }[stage]
    plan.learning = c * zero.bucket if stage < 3 else c * (2 * bucket + 2 * sizes.block)
    plan.stepping = 4 * share if stage == 3 and not zero.offload else 0.0

    gpu[TEACHER] = c * share if zero.teacher else c * P
    gpu[WEIGHTS], optimizer[OPTIMIZER] = weights, masters_and_moments
    gpu[GRADIENTS], cpu[GRADIENTS] = rest_gradients + gradients, host_gradients
    gpu[EMA], own = c * (P if stage < 3 else share) * held[EMA], 4 * share * held[EMA]
    optimizer[EMA] += own
    if held[FAKE]:
        gpu[FAKE], cpu[FAKE] = weights + rest_gradients, host_gradients
        optimizer[FAKE] += masters_and_moments
    trained = 1 + held[FAKE]
    gpu[BUFFERS] = trained * buffers
    cpu[BUFFERS] = trained * host_buffers
    return plan


def _moved(zero: ZeroConfig, sizes: Sizes, work: Work, c: int, N: int) -> float:
    """Bytes that a worker sends in a step, over the network and between CPU and GPU; rings, as NCCL has them."""
    ring, P, moved = (N - 1) / N, sizes.all, 0.0
    for role, learns in work.learns.items():
        steps = learns if role == "fake" else 1  # the fake score makes one with each of its passes
        passes = learns * work.parts
        if zero.stage == 0:
            moved += steps * 2 * 4 * P * ring
        elif zero.stage == 1:
            moved += steps * (2 * c * P + c * P) * ring
        elif zero.stage == 2:
            moved += passes * 2 * c * P * ring + steps * c * P * ring
        else:
            moved += passes * 3 * c * P * ring  # gathered forward and backward, and the gradient reduced
        if zero.offload:
            moved += steps * (4 + c) * P / N
    if zero.stage in (1, 2):
        moved += c * P * ring  # the EMA, published
    if zero.stage == 3:
        gathered = {role: n for role, n in work.calls.items() if role != "teacher" or zero.teacher}
        moved += sum(gathered.values()) * work.parts * c * P * ring
    return moved


def shapes_of(config: TSCDConfig, unet_config: dict[str, Any], size: int, tokens: int) -> dict[bool, Shape]:
    """What the UNet computes in; by whether it is shared out."""
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    told = {"size": size, "dtype": dtype, "checkpointing": config.optim.checkpointing, "tokens": tokens}
    plain = shape_of(unet_config, **told, autocast=dtype == torch.bfloat16)
    return {False: plain, True: shape_of(unet_config, **told)}


def plan(
    config: TSCDConfig, unet_config: dict[str, Any], size: int, workers: int, zero: ZeroConfig, tokens: int = 77
) -> Plan:
    """One way of `workers` workers to train `config`; `size` is the latents' side, `tokens` a prompt's length."""
    sizes, c = sizes_of(unet_config, zero), 2 if config.run.precision == "bf16" else 4
    previous = config.distill.teacher == "previous" and config.stages > 1
    held = {EMA: 1 + previous, FAKE: int(isinstance(config, OneStepConfig))}
    work = work_of(config, workers, shapes_of(config, unet_config, size, tokens)[zero.stage > 0])
    made = _shared(zero, sizes, held, c, workers) if zero.stage else _plain(sizes, held, c)
    made.gpu[ACTIVATIONS] = work.peak
    made.gpu[BUFFERS] += max(made.learning, made.stepping - work.peak)
    if config.adversarial.adv_end > 0 or config.adversarial.adv_start > 0:
        made.gpu[BUFFERS] += 12 * sizes.heads  # the discriminator and its moments
    made.moved = _moved(zero, sizes, work, c, workers)
    return made


def ways(zero: ZeroConfig) -> list[ZeroConfig]:
    """All that are worth a look, with what else `zero` says."""
    kinds = [(0, False, False)]
    kinds += [(stage, offload, stage == 3) for stage in (1, 2, 3) for offload in (False, True)]
    return [
        zero.model_copy(update={"stage": stage, "offload": offload, "teacher": teacher})
        for stage, offload, teacher in kinds
    ]


def cheapest(plans: list[Plan], room: float) -> Plan | None:
    """Of those that fit into `room` bytes of a GPU, the one that moves least; None when none fits."""
    fitting = [made for made in plans if made.total <= room]
    return min(fitting, key=lambda made: (made.moved, made.total), default=None)
