"""The configuration of reward model training on preference pairs (paper, Eq. 11)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from pydantic import Field, model_validator

from hypersd_ray.config.base import CombinationError, Strict
from hypersd_ray.config.run import OptimConfig, RunConfig, check_shares


class PreferencePairsConfig(Strict):
    """Where preference pairs are."""

    train: tuple[str, ...]
    """Parquet, JSON or JSON-lines files or patterns. Columns, found by themselves: prompt, chosen, rejected;
    Pick-a-Pic's caption, jpg_0, jpg_1, label_0; ImageRewardDB's prompt, prompt_id, rank, image (or image_path beside the
    file)."""
    held_out: tuple[str, ...] = ()
    """Files for the pairwise accuracy; without them a share of the training prompts is set aside."""
    held_out_share: float = Field(default=0.05, gt=0, lt=1)
    """Which share, by a hash of the prompt: no prompt is on both sides."""
    resolution: int = Field(default=224, ge=8)
    """Side that pictures are resized and cropped to when they are read (PIL, as the references do)."""


class PreferenceConfig(Strict):
    """A reward model and the pairs that teach it."""

    pairs: PreferencePairsConfig
    """Preferences."""
    init: str
    """ImageReward's checkpoint, or a folder of its class, to start from."""
    tokenizer: str = ""
    """bert-base-uncased's vocab.txt; a folder has its own."""
    freeze: float = Field(default=0.7, ge=0, le=1)
    """Share of the layers of both encoders, from the bottom, that stay as they are (the authors': 0.7)."""
    steps: int = Field(default=2000, ge=1)
    """Optimiser steps."""
    optim: OptimConfig = OptimConfig(lr=1e-5, batch=64, schedule="cosine")
    """The optimiser; `batch` counts pairs."""
    eval_every: int = Field(default=200, ge=1)
    """Steps between measurements of the held-out accuracy."""
    eval_pairs: int = Field(default=2000, ge=2)
    """Held-out pairs measured at most."""
    run: RunConfig = RunConfig(name="reward")
    """Where it runs."""

    @model_validator(mode="after")
    def _batch_fits(self) -> PreferenceConfig:
        check_shares(self.optim.batch, self.run, self.optim)
        if self.run.min_workers is not None:
            raise CombinationError(
                f"run.min_workers={self.run.min_workers}: the number of these workers is fixed; leave it out"
            )
        return self

    @property
    def stage_steps(self) -> tuple[int, ...]:
        """There is one stage."""
        return (self.steps,)

    def located(self, locate: Callable[[str], str]) -> Self:
        """The same with `locate` applied to each path that workers read."""
        pairs = self.pairs.model_copy(
            update={name: tuple(map(locate, getattr(self.pairs, name))) for name in ("train", "held_out")}
        )
        paths = {name: locate(value) for name in ("init", "tokenizer") if (value := getattr(self, name))}
        return self.model_copy(update=paths | {"pairs": pairs})
