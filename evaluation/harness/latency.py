"""Seconds and bytes of one picture, split into text encoder, UNet and autoencoder.

Measured one picture at a time, as a user waits for it, with nothing else of the job running. Bytes are what tensors hold:
the part's weights, and the most that its activations take; CUDA's allocator counts them there, the profiler on a CPU.
"""

from __future__ import annotations

import gc
import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from evaluation.harness.prompts import Row
from evaluation.harness.sampler import PARTS, Sampler
from evaluation.harness.subjects import Cell
from hypersd_ray.training import samples

WARM_UP = 2
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Latency:
    """seconds: part -> of each picture; weights, activations: part -> bytes."""

    device: str
    threads: int
    seconds: dict[str, list[float]]
    weights: dict[str, int] = field(default_factory=dict)
    activations: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))


def device_name(device: str) -> str:
    """In words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}"


def file_name(device: str, repeats: int, threads: int) -> str:
    """Of a cell's measurement in the store, with a hash of this machine's GPU or CPU and the threads: elsewhere it is measured
    again, for milliseconds are of one machine."""
    name = device_name(device) if not device.startswith("cuda") or torch.cuda.is_available() else ""
    if not device.startswith("cuda"):
        lines = CPU_INFO.read_text().splitlines() if CPU_INFO.is_file() else []
        name += next((line for line in lines if line.startswith("model name")), platform.processor())
    return f"latency-{device}-{hashlib.sha256(f'{name} {threads}'.encode()).hexdigest()[:8]}-{repeats}.json"


def measure(sampler: Sampler, cell: Cell, rows: Sequence[Row], repeats: int) -> Latency:
    """Of `cell`, over `repeats` pictures."""
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    for i in range(WARM_UP + repeats):
        made = sampler(cell, [rows[i % len(rows)]])
        if i >= WARM_UP:
            for part in PARTS:
                seconds[part].append(made.seconds[part])
    activations = {part: _peak(call, sampler.device) for part, call in _parts(sampler, cell, rows[0]).items()}
    encoders = sampler.encoders
    weights = {
        "text": sum(map(_bytes, encoders.text_encoders)), "unet": _bytes(sampler.unet), "vae": _bytes(encoders.vae)
    }  # fmt: skip
    return Latency(device_name(sampler.device), torch.get_num_threads(), seconds, weights, activations)


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in [*module.parameters(), *module.buffers()])


def _parts(sampler: Sampler, cell: Cell, row: Row) -> dict[str, Callable[[], Any]]:
    cond = sampler.conditioning([row.prompt])
    x_T = samples.start_noise(cell.seed, [row.key], sampler.shape).to(sampler.device)
    return {
        "text": lambda: sampler.conditioning([row.prompt]),
        "unet": lambda: sampler.sample(cell, x_T, cond, [row.key]),
        "vae": lambda: sampler.encoders.decode(x_T),
    }


@torch.no_grad()
def _peak(call: Callable[[], Any], device: str) -> int:
    """Most bytes that `call` has in tensors beyond what was there before."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(change for _, change in changes), default=0)
