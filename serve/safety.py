"""Checks of prompts and images: a protocol, two checkers behind it, and the guard that asks them.

Pictures are uint8 (H, W, 3).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from ray.serve.handle import DeploymentHandle

from serve.calls import replied
from serve.errors import ApiError
from serve.settings import SafetySettings

POLICY_CODE = "content_policy_violation"
RETRY_AFTER = 1
"""Seconds; a check is short."""


class Checker(Protocol):
    """What a checker's deployment must do. It is made as `Class(settings, base)`: the safety settings, the base's folder.

    Attributes:
        judges_prompts: whether `check_prompt` is to be asked.
    """

    judges_prompts: bool

    def check_prompt(self, prompt: str) -> bool:
        """Whether nothing must be drawn of `prompt`."""
        ...

    def check(self, pictures: Sequence[np.ndarray]) -> list[bool]:
        """For each picture, whether it must not be shown."""
        ...


class Stopwatch(Protocol):
    """Where the time of a check is written."""

    def mark(self) -> None: ...

    def lap(self, stage: str) -> None: ...


class Guard:
    """Asks before and after the model."""

    def __init__(self, settings: SafetySettings, checker: DeploymentHandle | None, judges_prompts: bool = False):
        self.checker, self.judges_prompts = checker, judges_prompts
        words = "|".join(re.escape(word) for word in settings.blocked_words)
        self._blocked = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE) if words else None

    async def check_prompt(self, prompt: str) -> None:
        """Raises ApiError 400 for a prompt with a blocked word, or one that the checker refuses; or as `replied`."""
        if self._blocked is not None and self._blocked.search(prompt):
            raise ApiError(400, "prompt: refused by this server's word list", "prompt", POLICY_CODE)
        checker = self.checker
        if checker is None or not self.judges_prompts:
            return
        if await replied(lambda: checker.check_prompt.remote(prompt), RETRY_AFTER, "safety_checker"):
            raise ApiError(400, "prompt: refused by this server's safety checker", "prompt", POLICY_CODE)

    async def check_images(self, pictures: Sequence[np.ndarray], watch: Stopwatch) -> None:
        """Raises ApiError 400 when a picture must not be shown; or as `replied`."""
        watch.mark()
        checker = self.checker
        if checker is None:
            return
        flagged = await replied(lambda: checker.check.remote(list(pictures)), RETRY_AFTER, "safety_checker")
        watch.lap("check")
        if any(flagged):
            raise ApiError(400, "an image was refused by this server's safety checker", None, POLICY_CODE)
