"""Which reward and perception models judge pictures, from which files, and where they run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal, Self

from pydantic import Field

from hypersd_ray.config.base import Strict

RewardName = Literal[
    "aesthetic_v1", "aesthetic_v2", "image_reward", "image_reward_package", "clip_score", "pick_score", "hps_v21"
]


class RewardConfig(Strict):
    """One reward model r_d of Eq. 15."""

    name: RewardName
    """Which class: LAION's aesthetic predictors, ImageReward (or its authors' package), CLIP score, PickScore, HPS v2.1."""
    checkpoint: str
    """Its weights: the published file, or a folder that says its own sizes."""
    tower: str = ""
    """aesthetic_*: weights of the CLIP below the head (OpenAI's ViT-L/14 in open_clip's layout), or its folder."""
    architecture: str = ""
    """open_clip's name of the CLIP; empty takes the published one. A folder says itself."""
    tokenizer: str = ""
    """image_reward*: bert-base-uncased's vocab.txt; a folder has its own."""
    python: str = ""
    """Interpreter of the actor, at this path on every node: image_reward_package's own (jobs/image_reward_env.py)."""
    role: Literal["train", "watch"] = "train"
    """"train": its hinge is in the loss; "watch": held out, only measured, to catch reward hacking."""
    alpha: float = 2.0
    """alpha_d of Eq. 15: a sample that scores above it is left alone."""
    weight: float = Field(default=1.0, ge=0)
    """Factor of its hinge in the sum."""

    def located(self, locate: Callable[[str], str]) -> Self:
        """The same with `locate` applied to each path that workers or actors read."""
        paths = {name: locate(path) for name in ("checkpoint", "tower", "tokenizer") if (path := getattr(self, name))}
        # An interpreter's links stay: what a virtual environment's leads to knows nothing of the environment.
        python = os.path.abspath(self.python) if "/" in self.python else self.python
        return self.model_copy(update=paths | {"python": python})


class PerceptionConfig(Strict):
    """The instance segmentation model m_I of Eq. 16."""

    name: Literal["solo", "mask2former"] = "solo"
    """"solo": SOLO R50-FPN in mmdetection's layout; "mask2former": a transformers folder."""
    checkpoint: str = ""
    """Its weights or folder."""
    short_side: int = Field(default=0, ge=0)
    """Pixels that the short side is resized to before the network; 0 takes the checkpoint's own."""


class PlacementConfig(Strict):
    """Where reward and perception models run."""

    where: Literal["actors", "local"] = "actors"
    """"actors": shared Ray actors, each model in memory once; "local": in each training worker."""
    num_gpus: float = Field(default=0, ge=0)
    """GPU share of each actor; 0 scores on the CPU."""
    num_cpus: float = Field(default=0, ge=0)
    """CPU cores reserved for each actor; 0 lets it stand beside the workers."""
    replicas: int = Field(default=1, ge=1)
    """Actors of each model; workers are dealt to them in turn."""
    label_selector: dict[str, str] = Field(default_factory=dict)
    """Ray node labels that the actors' nodes must have."""
    max_batch: int = Field(default=32, ge=1)
    """Images scored at once; calls of several workers are joined up to it, longer ones are cut."""
    wait_ms: float = Field(default=2.0, ge=0)
    """How long a call waits for others to join it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number type of the models; bf16 is for GPUs."""
    place_timeout_s: float = Field(default=45.0, gt=0)
    """Seconds after which an actor that found no place ends the job."""
    load_timeout_s: float = Field(default=900.0, gt=0)
    """Seconds that loading a model's weights may take."""
