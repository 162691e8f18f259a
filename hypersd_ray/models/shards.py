"""One network under DeepSpeed ZeRO, and where this worker's share of its float32 weights lies.

A share is a list of flat float32 tensors, `flats`; `pieces` says which part of which parameter lies where in them. All
networks of one shape are shared out alike, so the pieces of the student are those of its average and of the fake score:
what is done to a flat is done to the network, and no parameter is ever whole in float32.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from hypersd_ray.config.run import OptimConfig
from hypersd_ray.config.zero import ZeroConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
GATHERED_AT_ONCE = [ResnetBlock2D, BasicTransformerBlock]
"""Stage 3 gathers such a block's weights in one message, where it would send one for each of a dozen layers."""


@dataclass(frozen=True)
class Piece:
    """The part [start, start + size) of a parameter of `shape`, at `offset` of the share's flat number `flat`."""

    shape: torch.Size
    flat: int = 0
    offset: int = 0
    start: int = 0
    size: int = 0


class HeldAdamW(torch.optim.AdamW):
    """AdamW whose step can be held back: DeepSpeed then does all it does after one, with the same weights."""

    held = False

    def step(self, closure: Any = None) -> Any:
        return None if self.held else super().step(closure)


def load_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed for the kind of `device`, quiet."""
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", "0")  # it insists; which device it is comes with each engine
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    # It would compile an all-reduce of its own for CPUs at its first use (a minute or two, a compiler, one node only).
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def deepspeed_config(zero: ZeroConfig, dtype: torch.dtype, device: torch.device, clip: float = 0.0) -> dict[str, Any]:
    """DeepSpeed's settings. Batches, accumulation and the learning rate stay ours: it steps when it is told to."""
    pinned = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW needs no compiler, and is as exact everywhere
        "zero_optimization": {
            "stage": zero.stage,
            "reduce_bucket_size": zero.bucket,
            "allgather_bucket_size": zero.bucket // 2 * 2 or 2,
            "stage3_prefetch_bucket_size": min(zero.bucket, 50_000_000),
            "stage3_param_persistence_threshold": min(zero.bucket // 2000, 100_000),
            # What is fetched ahead, or kept from a forward pass for its backward pass, stays where none follows.
            "stage3_max_live_parameters": zero.bucket,
            "stage3_max_reuse_distance": zero.bucket,
        }
        | ({"offload_optimizer": pinned} if zero.offload else {}),
    }


def initialize(network: nn.Module, config: dict[str, Any], device: torch.device, optimizer: Any = None) -> Any:
    """DeepSpeed's engine for `network` in the process group that there is."""
    assert dist.is_initialized(), "ZeRO shares out over a process group; Ray Train makes it"
    here, deepspeed = SimpleNamespace(device_rank=device.index or 0), load_deepspeed(device)
    if config["zero_optimization"]["stage"] == 3:
        deepspeed.utils.set_z3_leaf_modules(network, GATHERED_AT_ONCE)
    with redirect_stdout(io.StringIO()):  # where it reports the memory in use
        return deepspeed.initialize(args=here, model=network, optimizer=optimizer, config=config)[0]


class Trained:
    """A network that learns: DeepSpeed's engine and this worker's share of what it updates.

    Args:
        network: float32, on any device; taken over.
        optim: AdamW's settings and the clipping.
        zero: stage 1, 2 or 3.
        dtype: what it computes in; the weights that are updated are float32.
        device: where it computes.
    """

    def __init__(
        self, network: nn.Module, optim: OptimConfig, zero: ZeroConfig, dtype: torch.dtype, device: torch.device
    ):
        self.zero, self.dtype, self.device, self.network = zero, dtype, device, network
        self.pending = False
        network.requires_grad_(True)
        first = {name: p.data for name, p in network.named_parameters()}  # in float32: the engine casts
        self.base = HeldAdamW(
            network.parameters(), lr=optim.lr, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay,
            fused=True,
        )  # fmt: skip
        self.engine = initialize(network, deepspeed_config(zero, dtype, device, optim.clip), device, self.base)
        self.sharded = self.engine.optimizer
        self.flats = self._flats()
        self.pieces = {name: self._piece(p) for name, p in network.named_parameters()}
        if dtype != torch.float32:
            scatter(first, self.pieces, self.flats)

    def _flats(self) -> list[Tensor]:
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(self.sharded, name):  # stage 3; 1 and 2; 1 in bfloat16
                return getattr(self.sharded, name)
        raise AssertionError(f"{type(self.sharded).__name__} keeps its float32 weights elsewhere")

    def _piece(self, p: Any) -> Piece:
        if self.zero.stage == 3:
            flat, offset, share = self.sharded.grad_position[self.sharded.get_param_id(p)]
            start = dist.get_rank() * share
            return Piece(p.ds_shape, flat, offset, start, max(0, min(share, p.ds_numel - start)))
        if p._hp_mapping is None:  # none of it is ours
            return Piece(p.shape)
        whole, ours = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
        return Piece(p.shape, p._hp_mapping.param_group_index, ours.start, whole.start, ours.numel)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the loss's gradient."""
        self.engine.backward(loss, scale_wrt_gas=False)
        self.pending = True

    def step(self, lr: float, hold: bool = False) -> Tensor:
        """Average over the workers, clip, step; the gradient's norm.

        A NaN or inf on any worker, or `hold`, leaves weights and moments as they were; the norm is then not finite.
        """
        for group in self.base.param_groups:
            group["lr"] = lr
        self.base.held = hold
        self.engine.step()
        if not self.engine.was_step_applied():
            # Under offload it keeps a gradient that has a NaN, and adds the next ones to it.
            for group in getattr(self.sharded, "averaged_gradients", {}) if self.zero.stage < 3 else ():
                self.sharded.averaged_gradients[group] = None
        self.base.held = self.pending = False
        norm = float("nan") if hold else float(self.engine.get_global_grad_norm())
        return torch.tensor(norm, device=self.device)

    @torch.no_grad()
    def publish(self) -> None:
        """The network's weights := the flats, after these were written to."""
        if self.zero.stage < 3:
            self.sharded.update_lp_params()
            return
        for weights, flat in zip(self.sharded.fp16_partitioned_groups_flat, self.flats, strict=True):
            weights.data.copy_(flat.data)
        if small := self.sharded.persistent_parameters:  # these are kept whole
            small[0].partition(small)
            small[0].all_gather(small)

    def forget(self) -> None:
        """Moments start anew."""
        self.base.state.clear()

    def moments(self) -> dict[str, Tensor]:
        """By name, on rank 0's CPU; nothing on the other ranks, nor before the first step."""
        if MOMENTS[0] not in self.base.state.get(self.flats[0], {}):
            return {}
        found: dict[str, Tensor] = {}
        for key in MOMENTS:
            flats = [self.base.state[flat][key] for flat in self.flats]
            found |= {f"{key}/{name}": t for name, t in collect(flats, self.pieces, self.device)}
        return found | {"step": self.base.state[self.flats[0]]["step"].cpu()} if dist.get_rank() == 0 else {}

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """What `moments` gave, of any number of workers; the same on every rank."""
        self.forget()
        if not moments:
            return
        for flat in self.flats:
            fresh: dict[str, Tensor] = {key: torch.zeros_like(flat) for key in MOMENTS}
            self.base.state[flat] = fresh | {"step": moments["step"].to(flat.device, copy=True)}
        for key in MOMENTS:
            named = {name: f"{key}/{name}" for name in self.pieces}
            scatter(Renamed(moments, named), self.pieces, [self.base.state[flat][key] for flat in self.flats])

    def save_own(self, folder: Path) -> None:
        """DeepSpeed's own checkpoint, each rank its share."""
        self.engine.save_checkpoint(str(folder), tag="zero", save_latest=False)

    def load_own(self, folder: Path) -> None:
        """What `save_own` wrote with as many workers and the same stage."""
        kinds = safe_kinds()

        def load(path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals(kinds):
                return torch.load(path, map_location=map_location, weights_only=True)

        self.engine.checkpoint_engine.load = load
        path, _ = self.engine.load_checkpoint(str(folder), tag="zero")
        assert path is not None, f"DeepSpeed found no checkpoint in {folder}, though it is whole"


def safe_kinds() -> list[Any]:
    """Classes beside tensors in DeepSpeed's files."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


class Followed:
    """A network that is not trained, with weights shared out as those of a trained one: its average, say."""

    def __init__(self, network: nn.Module, trained: Trained):
        self.trained, device = trained, trained.device
        if trained.zero.stage == 3:
            self.flat = None
            self.network = partitioned(network, trained.zero, trained.dtype, device)
            return
        self.network = placed(network.requires_grad_(False), device, trained.dtype)
        weights = getattr(trained.sharded, "bit16_groups_flat", None) or trained.sharded.bf16_groups_flat
        self.flat = torch.zeros_like(weights[0])
        begin = weights[0].storage_offset()
        for p, like in zip(network.parameters(), trained.network.parameters(), strict=True):
            p.data = self.flat.narrow(0, like.data.storage_offset() - begin, p.numel()).view(p.shape)

    @torch.no_grad()
    def publish(self, flats: list[Tensor]) -> None:
        """The network's weights := flats."""
        if self.flat is not None:
            dist.all_gather_into_tensor(self.flat, flats[0].to(self.flat.device, self.flat.dtype))
            return
        self.network.optimizer.empty_partition_cache()
        for name, p in self.network.module.named_parameters():
            piece = self.trained.pieces[name]
            share = p.ds_tensor.numel()
            p.ds_tensor.data.copy_(flats[piece.flat].narrow(0, piece.offset, share))


def placed(network: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """`network.to`, without diffusers' doubts about it: nothing in these networks must stay in float32."""
    return nn.Module.to(network, device, dtype)


def partitioned(network: nn.Module, zero: ZeroConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """A frozen network of which every worker holds a share, gathered layer by layer where it is called."""
    config = deepspeed_config(zero.model_copy(update={"offload": False}), dtype, device)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # what is kept whole would go stale
    return initialize(network.requires_grad_(False), config, device)


@torch.no_grad()
def collect(flats: list[Tensor], pieces: Mapping[str, Piece], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor on the CPU) on rank 0; nothing on the others, which must iterate too."""
    for name, piece in pieces.items():
        whole = torch.zeros(piece.shape.numel(), device=device)
        whole[piece.start : piece.start + piece.size] = flats[piece.flat].narrow(0, piece.offset, piece.size)
        dist.reduce(whole, 0)
        if dist.get_rank() == 0:
            yield name, whole.view(piece.shape).cpu()


@torch.no_grad()
def scatter(tensors: Mapping[str, Tensor], pieces: Mapping[str, Piece], flats: list[Tensor]) -> None:
    """Each piece of `tensors` into its place; every rank has all of them."""
    for name, piece in pieces.items():
        part = tensors[name].reshape(-1).narrow(0, piece.start, piece.size)
        flats[piece.flat].narrow(0, piece.offset, piece.size).copy_(part)


class Renamed(Mapping[str, Tensor]):
    """A mapping under other names; a tensor is read when it is asked for."""

    def __init__(self, inner: Mapping[str, Tensor], names: Mapping[str, str]):
        self.inner, self.names = inner, names

    def __getitem__(self, name: str) -> Tensor:
        return self.inner[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
