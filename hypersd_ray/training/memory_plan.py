"""What each worker of a full UNet's training holds, before a weight is loaded, and which way of sharing it out fits.

The states' sizes are what `FullRoles`, `Trained` and `Followed` (models/) and DeepSpeed keep, a line each; the
activations are measured (activations.py). Bytes throughout.
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
        generated = rows - again  # rows of newly made latents
        real = looking(frozen, generated * (1 if config.dmd.guidance == 1 else 2))
        peaks = [student(generated, max(real, looking(shape, generated)))]
        learns = {"student": 1 + (again > 0)}
        calls = {"teacher": (again > 0) + 1, "ema": int(again > 0), "fake": 0}
        if again:
            peaks += [student(again), looking(frozen, guided * again)]
        if config.regression.pairs is not None:
            peaks.append(student(max(1, config.regression.batch // (workers * parts))))
            learns["student"] += 1
        if config.dmd.weight > 0 and config.dmd.fake_updates:
            peaks.append(learning(shape, generated).peak)
            learns["fake"], calls["fake"] = config.dmd.fake_updates, 1
            calls["student"] = config.dmd.fake_updates
    else:
        peaks.append(student(rows))
    return Work(parts, learns, calls, max(peaks))


def _plain(sizes: Sizes, held: dict[str, int], bytes_each: int) -> Plan:
    """ZeRO stage 0: FullRoles and AdamW; float32 but for the teacher, whose weights take `bytes_each`."""
    plan, weights = Plan(ZeroConfig()), sizes.all
    plan.gpu |= {
        TEACHER: bytes_each * weights, WEIGHTS: 4 * weights, OPTIMIZER: 8 * weights, GRADIENTS: 4 * weights,
        EMA: 4 * weights * held[EMA], FAKE: 12 * weights * held[FAKE],
    }  # fmt: skip
    plan.stepping = 4 * min(weights, BUCKET + sizes.largest)  # a message of gradients
    return plan


@dataclass(frozen=True)
class AtRest:
    """What the engine of one trained network holds between its steps; `host_*` in the CPU's memory, `optimizer` (float32
    weights and moments) there where it is offloaded."""

    weights: float
    optimizer: float
    gradients: float
    host_gradients: float
    buffers: float
    host_buffers: float


def _at_rest(zero: ZeroConfig, sizes: Sizes, bytes_each: int, workers: int) -> AtRest:
    """Bytes per weight of the network, `each` where a weight takes bytes_each, of which / N is a worker's share:

    stage       weights     gradients, GPU          gradients, CPU            buffers
    1           each        4 in bfloat16, else 0   0                         0
    1 offload   each        0                       4 / N                     a share in the CPU's memory, a weight in both
    2           each        0                       0                         0
    2 offload   each        0                       4 / N in bfloat16, 8 / N  as 1 offload
    3           each / N    4 / N                   0                         a bucket
    3 offload   each / N    0                       8 / N                     a bucket

    Beside them everywhere 12 / N of `optimizer`, and in stage 3 the small weights that stay whole.
    """
    share, bfloat16 = sizes.all / workers, bytes_each == 2
    weights = bytes_each * (share + sizes.small if zero.stage == 3 else sizes.all)
    buffers = host_buffers = 0.0
    if zero.stage == 3:
        buffers = bytes_each * zero.bucket  # that gradients are reduced from
    elif zero.offload:
        buffers = bytes_each * sizes.largest
        host_buffers = bytes_each * (share + sizes.largest)
    if zero.offload:  # the float32 weights' gradients, and where those came from
        gradients, host_gradients = 0.0, {1: 4, 2: 4 if bfloat16 else 8, 3: 8}[zero.stage] * share
    else:  # BF16_Optimizer keeps all of float32 gradients, stage 3 its share
        gradients, host_gradients = {1: 4 * sizes.all if bfloat16 else 0, 2: 0, 3: 4 * share}[zero.stage], 0.0
    return AtRest(weights, 12 * share, gradients, host_gradients, buffers, host_buffers)


@dataclass(frozen=True)
class WhileLearning:
    """What is on the GPU beside `AtRest` in a network's step: `buffers` meanwhile, `stepping` after the backward pass."""

    gradients: float
    buffers: float
    stepping: float


def _while_learning(zero: ZeroConfig, sizes: Sizes, bytes_each: int, workers: int) -> WhileLearning:
    """Bytes per weight of the network, as in `_at_rest`:

    stage       gradients                     buffers                  stepping
    1           each in bfloat16, else 4      a bucket                 0
    1 offload   4                             a bucket                 0
    2           4 / N in bfloat16, else 8 / N a bucket                 0
    2 offload   4 / N in bfloat16, else 0     a bucket                 0
    3           a block's                     two buckets, two blocks  4 / N
    3 offload   a block's                     two buckets, two blocks  0
    """
    share, bfloat16 = sizes.all / workers, bytes_each == 2
    if zero.stage == 3:
        buffers = bytes_each * (2 * min(zero.bucket, sizes.all) + 2 * sizes.block)
        return WhileLearning(bytes_each * sizes.block, buffers, 0.0 if zero.offload else 4 * share)
    if zero.stage == 2:
        gradients = (4 if bfloat16 else 0 if zero.offload else 8) * share
    else:
        gradients = (bytes_each if bfloat16 and not zero.offload else 4) * sizes.all
    return WhileLearning(gradients, bytes_each * zero.bucket, 0.0)


def _shared(zero: ZeroConfig, sizes: Sizes, held: dict[str, int], bytes_each: int, workers: int) -> Plan:
    """ZeRO stages 1 to 3: the engine's tensors for each trained network, of which one learns at a time, and the shares of
    those that follow."""
    rest = _at_rest(zero, sizes, bytes_each, workers)
    learns = _while_learning(zero, sizes, bytes_each, workers)
    plan, share = Plan(zero, learns.buffers, learns.stepping), sizes.all / workers
    gpu, cpu = plan.gpu, plan.cpu
    optimizer = cpu if zero.offload else gpu
    gpu[TEACHER] = bytes_each * (share if zero.teacher else sizes.all)
    gpu[WEIGHTS] = rest.weights
    optimizer[OPTIMIZER] = rest.optimizer
    gpu[GRADIENTS], cpu[GRADIENTS] = rest.gradients + learns.gradients, rest.host_gradients
    gpu[EMA] = bytes_each * (share if zero.stage == 3 else sizes.all) * held[EMA]
    optimizer[EMA] += 4 * share * held[EMA]
    if held[FAKE]:
        gpu[FAKE], cpu[FAKE] = rest.weights + rest.gradients, rest.host_gradients
        optimizer[FAKE] += rest.optimizer
    trained = 1 + held[FAKE]
    gpu[BUFFERS], cpu[BUFFERS] = trained * rest.buffers, trained * rest.host_buffers
    return plan


def _moved(zero: ZeroConfig, sizes: Sizes, work: Work, bytes_each: int, workers: int) -> float:
    """Bytes that a worker sends in a step, over the network and between CPU and GPU; rings, as NCCL has them."""
    ring, moved = (workers - 1) / workers, 0.0
    weights = bytes_each * sizes.all  # bytes of a network's
    for role, learns in work.learns.items():
        steps = learns if role == "fake" else 1  # the fake score makes one with each of its passes
        passes = learns * work.parts
        if zero.stage == 0:
            moved += steps * 2 * 4 * sizes.all * ring
        elif zero.stage == 1:
            moved += steps * 3 * weights * ring
        elif zero.stage == 2:
            moved += passes * 2 * weights * ring + steps * weights * ring
        else:
            moved += passes * 3 * weights * ring  # gathered forward and backward, and the gradient reduced
        if zero.offload:
            moved += steps * (4 + bytes_each) * sizes.all / workers
    if zero.stage in (1, 2):
        moved += weights * ring  # the EMA, published
    if zero.stage == 3:
        gathered = {role: n for role, n in work.calls.items() if role != "teacher" or zero.teacher}
        moved += sum(gathered.values()) * work.parts * weights * ring
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
    sizes, bytes_each = sizes_of(unet_config, zero), 2 if config.run.precision == "bf16" else 4
    previous = config.distill.teacher == "previous" and config.stages > 1
    held = {EMA: 1 + previous, FAKE: int(isinstance(config, OneStepConfig))}
    work = work_of(config, workers, shapes_of(config, unet_config, size, tokens)[zero.stage > 0])
    made = _shared(zero, sizes, held, bytes_each, workers) if zero.stage else _plain(sizes, held, bytes_each)
    made.gpu[ACTIVATIONS] = work.peak
    made.gpu[BUFFERS] += max(made.learning, made.stepping - work.peak)
    if config.adversarial.adv_end > 0 or config.adversarial.adv_start > 0:
        made.gpu[BUFFERS] += 12 * sizes.heads  # the discriminator and its moments
    made.moved = _moved(zero, sizes, work, bytes_each, workers)
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
