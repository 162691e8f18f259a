"""What goes between ingress and denoiser: plain data, no torch.

Pictures are uint8 (H, W, 3).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class BatchKey:
    """What images of one batch have in common."""

    width: int
    height: int
    steps: int
    eta: float
    lora: str
    lora_scale: float
    guided: bool
    control: str | None = None


@dataclass(frozen=True, eq=False)
class Shot:
    """One image to make.

    Attributes:
        guidance: uncond + guidance (cond - uncond); 1 in a batch that is not guided.
        show_after: steps (counted from 1) after which the x_0 prediction is wanted.
        control: (H, W, 3) uint8, the ControlNet's input.
    """

    prompt: str
    seed: int
    negative_prompt: str = ""
    guidance: float = 1.0
    show_after: frozenset[int] = frozenset()
    control: np.ndarray | None = None
    control_scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Work:
    """One request: images of one key."""

    key: BatchKey
    shots: tuple[Shot, ...]


@dataclass(frozen=True, eq=False)
class Preview:
    """The x_0 prediction of image `index` after `step` steps."""

    index: int
    step: int
    pixels: np.ndarray


@dataclass(frozen=True, eq=False)
class Picture:
    """Image `index`, finished.

    Attributes:
        batch_size: of the batch it was in.
        prompt_tokens: of the whole prompt, start and end not counted.
        seconds: by stage (text, denoise, preview, decode), of the batch it was in.
        warnings: for the client.
    """

    index: int
    pixels: np.ndarray
    batch_size: int
    prompt_tokens: int
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class DeviceLost(Exception):
    """The replica's accelerator is lost; another replica can do the work."""


@dataclass(frozen=True)
class Refused:
    """The request cannot be done, and it is the client's doing."""

    param: str
    message: str
    code: str = "invalid_value"
