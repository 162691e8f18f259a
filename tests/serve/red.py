"""A checker of one's own, as `safety.checker=module:Class` names it."""

from collections.abc import Sequence

import numpy as np

from serve.settings import SafetySettings


class RefusesRed:
    """Refuses prompts with the word blood, and pictures that are more red than blue."""

    judges_prompts = True

    def __init__(self, settings: SafetySettings, base: str):
        pass

    def check_prompt(self, prompt: str) -> bool:
        return "blood" in prompt

    def check(self, pictures: Sequence[np.ndarray]) -> list[bool]:
        return [bool(picture[..., 0].mean() > picture[..., 2].mean() + 50) for picture in pictures]
