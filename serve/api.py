"""The JSON of `POST /v1/images/generations`: OpenAI's fields, ours beside them, and how a body becomes `Work`."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import from_json

from serve.catalog import Catalog, LoRAInfo
from serve.control import read_control
from serve.errors import ApiError, bad_field, from_validation
from serve.settings import NO_LORA, Settings
from serve.work import BatchKey, Shot, Work

MAX_SEED = 2**53 - 1
"""Seeds stay exact in JavaScript."""

NOT_HERE = {
    "style": "the prompt is the only style there is",
    "mask": "this endpoint edits no images",
    "image": "this endpoint edits no images; control_image guides one where a ControlNet is configured",
    "frame_count": "no animations",
    "frame_duration_ms": "no animations",
    "svg": "no vector images",
    "complexity": "set num_inference_steps",
    "input_fidelity": "this endpoint edits no images",
}
"""Fields of OpenAI's API that are refused, and why."""


class Lenient(BaseModel):
    """Exact types, no unknown fields, no NaN; null is the same as absent."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class LoRAChoice(Lenient):
    """A LoRA and how much of it."""

    name: str = Field(
        min_length=1, max_length=128, description='A LoRA of GET /v1/models, or "none" for the bare base.'
    )
    scale: float = Field(default=1.0, ge=0, description="Times the LoRA's update of the weights.")


def _named(value: Any) -> Any:
    """A name alone is a LoRA at full scale."""
    if isinstance(value, str):
        return {"name": value}
    if value is None or isinstance(value, dict):
        return value
    raise ValueError("must be a LoRA's name, or an object with name and scale")


class GenerationRequest(Lenient):
    """What to draw."""

    prompt: Annotated[str, StringConstraints(min_length=1)] = Field(description="What is to be seen.")
    model: str | None = Field(default=None, description="A model of GET /v1/models; absent is the default.")
    n: int | None = Field(default=None, ge=1, description="Images; 1 if absent. Image i has the seed `seed + i`.")
    size: str | None = Field(default=None, description='WIDTHxHEIGHT, or "auto".')
    response_format: Literal["b64_json", "url"] | None = Field(default=None, description="b64_json if absent.")
    output_format: Literal["png", "jpeg", "webp"] | None = Field(default=None, description="png if absent.")
    output_compression: int | None = Field(
        default=None, ge=0, le=100, description="Quality of jpeg and webp; 90 if absent."
    )
    user: str | None = Field(default=None, max_length=512, description="Logged as a hash.")
    safety_identifier: str | None = Field(default=None, max_length=512, description="As `user`, and before it.")
    stream: bool | None = Field(default=None, description="Server-sent events in place of one JSON.")
    partial_images: int | None = Field(
        default=None, ge=0, le=7, description="With stream: previews of each image; 0 if absent, at most steps - 1."
    )
    background: Literal["auto", "opaque"] | None = Field(default=None, description="Images are opaque.")
    quality: Literal["auto", "standard"] | None = Field(
        default=None, description="There is one; num_inference_steps sets it."
    )
    moderation: Literal["auto"] | None = Field(default=None, description="The server's setting holds.")
    num_inference_steps: int | None = Field(default=None, ge=1, le=8, description="Sampling steps.")
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="Of the first image; drawn and told if absent."
    )
    eta: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="TCD's gamma, the noise that each step puts back; or DDIM's eta. LCM takes 1 alone.",
    )
    negative_prompt: str | None = Field(
        default=None, description="What is not to be seen, where the LoRA keeps guidance."
    )
    guidance_scale: float | None = Field(
        default=None,
        ge=1,
        description="uncond + scale (cond - uncond), where the LoRA keeps guidance; 1 is none. Absent: default_guidance of GET /v1/models.",
    )
    lora: Annotated[LoRAChoice | None, BeforeValidator(_named)] = Field(
        default=None, description="A LoRA's name, or its name and scale."
    )
    control_image: str | None = Field(
        default=None, description="The ControlNet's input: PNG or JPEG in base64, or a data URL."
    )
    control: str | None = Field(default=None, description="Which ControlNet, if there are several.")
    control_scale: float | None = Field(default=None, ge=0, le=2, description="The ControlNet's strength; 1 if absent.")


class Usage(BaseModel):
    """Tokens, as far as there are any: images are not counted in tokens here."""

    input_tokens: int
    output_tokens: int = 0
    total_tokens: int
    input_tokens_details: dict[str, int]


class ImageObject(BaseModel):
    """One image."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class GenerationResponse(BaseModel):
    """The images, and everything that is needed to make them again."""

    created: int
    data: list[ImageObject]
    background: str = "opaque"
    output_format: str
    size: str
    model: str
    num_inference_steps: int
    eta: float
    lora: LoRAChoice
    guidance_scale: float
    usage: Usage
    timings: dict[str, float] = Field(description="Seconds by stage, and in all.")
    batch_size: int = Field(description="Images of the largest batch that one of these was in.")
    warnings: list[str] = []


class ModelObject(BaseModel):
    """A model, or a LoRA on it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "hypersd-ray"
    lora: str | None = Field(default=None, description="The name for `lora`, where this is one.")
    steps: list[int] = Field(default=[], description="Step counts it is made for, the best first.")
    keeps_guidance: bool = Field(default=False, description="Takes guidance_scale and negative_prompt.")
    sizes: list[str] = []
    controls: list[str] = []
    scheduler: str = Field(description="diffusers' class that it is sampled with.")
    default_eta: float = Field(description="eta of a request that gives none.")
    default_guidance: float = Field(description="guidance_scale of a request that gives none; 1 is not guided.")
    max_guidance: float
    max_lora_scale: float
    max_images: int
    default_steps: int
    max_steps: int
    only_steps: int | None = Field(default=None, description="The one step count it can be sampled in, if it is tied.")
    examples: list[str] = Field(default=[], description="Prompts to begin with.")


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class Asked(BaseModel):
    """A request with every default filled in."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    prompt: str
    negative_prompt: str
    n: int
    seed: int
    key: BatchKey
    guidance: float
    control_image: Any = None
    control_scale: float = 1.0
    url: bool
    output_format: Literal["png", "jpeg", "webp"]
    quality: int
    stream: bool
    partial_images: int
    user: str | None

    @property
    def size(self) -> str:
        """WIDTHxHEIGHT."""
        return f"{self.key.width}x{self.key.height}"

    def show_after(self) -> list[int]:
        """The steps whose x_0 prediction is sent: spread evenly over all but the last."""
        steps, count = self.key.steps, min(self.partial_images, self.key.steps - 1)
        return [round((i + 1) * steps / (count + 1)) for i in range(count)]

    def work(self) -> Work:
        """What the denoiser gets."""
        show = frozenset(self.show_after())
        shots = tuple(
            Shot(self.prompt, self.seed + i, self.negative_prompt, self.guidance, show, self.control_image, self.control_scale)
            for i in range(self.n)
        )  # fmt: skip
        return Work(self.key, shots)


def parse_body(body: bytes) -> GenerationRequest:
    """The request in a body.

    Raises:
        ApiError: 400, with the field's name, or `body` when it is not JSON.
    """
    try:
        # NaN passes here so that the model can refuse it under its field's name
        content = from_json(body, allow_inf_nan=True)
    except ValueError as error:
        raise bad_field("body", f"not JSON: {error}", "invalid_json") from None
    if not isinstance(content, dict):
        raise bad_field("body", "must be a JSON object", "invalid_type")
    try:
        return GenerationRequest.model_validate(content)
    except ValidationError as error:
        raise from_validation(error, NOT_HERE) from None


def fill_in(request: GenerationRequest, settings: Settings, catalog: Catalog) -> Asked:
    """Check `request` against what is served and allowed, and fill in the defaults.

    Raises:
        ApiError: 400 or 404, with the field's name.
    """
    limits, n = settings.limits, request.n or 1
    _at_most("prompt", len(request.prompt), limits.prompt_chars, "characters", "limits.prompt_chars")
    _at_most(
        "negative_prompt", len(request.negative_prompt or ""), limits.prompt_chars, "characters", "limits.prompt_chars"
    )
    _at_most("n", n, limits.images, "images", "limits.images")
    steps = request.num_inference_steps or settings.model.default_steps
    _at_most("num_inference_steps", steps, limits.steps, "steps", "limits.steps")
    stream, previews = bool(request.stream), request.partial_images or 0
    if previews and not stream:
        raise bad_field("partial_images", "needs stream=true")
    output_format = request.output_format or "png"
    if request.output_compression is not None and output_format == "png":
        raise bad_field("output_compression", "png has no quality; use it with jpeg or webp")
    if stream and request.response_format == "url":
        raise bad_field("response_format", "a stream carries b64_json only")
    if not request.prompt.strip():
        raise bad_field("prompt", "is blank")
    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    if seed + n - 1 > MAX_SEED:
        raise bad_field("seed", f"seed + n - 1 must be at most {MAX_SEED}")
    lora, scale = _lora(request, steps, settings, catalog)
    guidance, negative = _guidance(request, lora, settings, catalog)
    width, height = _size(request.size, catalog)
    control, picture = read_control(
        request.control_image, request.control, request.control_scale, tuple(catalog.controlnets), width, height
    )
    key = BatchKey(
        width,
        height,
        steps,
        _eta(request, lora, steps, settings),
        lora.name if lora else NO_LORA,
        scale,
        guidance != 1,
        control,
    )
    return Asked(
        prompt=request.prompt, negative_prompt=negative, n=n, seed=seed, key=key, guidance=guidance,
        control_image=picture, control_scale=1.0 if request.control_scale is None else request.control_scale,
        url=request.response_format == "url", output_format=output_format,
        quality=90 if request.output_compression is None else request.output_compression, stream=stream,
        partial_images=previews, user=request.safety_identifier or request.user,
    )  # fmt: skip


def _at_most(param: str, value: int, limit: int, unit: str, knob: str) -> None:
    if value > limit:
        raise bad_field(param, f"{value} {unit}, at most {limit} are allowed here ({knob})")


def _size(size: str | None, catalog: Catalog) -> tuple[int, int]:
    wanted = catalog.sizes[0] if size in (None, "auto") else size
    if wanted not in catalog.sizes:
        raise bad_field("size", f"{str(size)[:32]!r} is not one of auto, {', '.join(catalog.sizes)}")
    width, height = str(wanted).split("x")
    return int(width), int(height)


def _lora(
    request: GenerationRequest, steps: int, settings: Settings, catalog: Catalog
) -> tuple[LoRAInfo | None, float]:
    """The LoRA of a request, by `lora`, by `model`, or by the number of steps; None is the bare base."""
    choice = request.lora
    named = _lora_of_model(request.model, catalog)
    if choice is None:
        guided = (request.guidance_scale or 1.0) != 1 or bool(request.negative_prompt)
        choice = LoRAChoice(name=named or catalog.choose(steps, guided))
    elif named is not None and named != choice.name:
        raise bad_field("lora", f"{choice.name!r} beside model={request.model!r}, which names another")
    if choice.scale > settings.limits.lora_scale:
        raise bad_field("lora.scale", f"{choice.scale:g} is above {settings.limits.lora_scale:g} (limits.lora_scale)")
    if choice.name == NO_LORA:
        if choice.scale != 1:
            raise bad_field("lora.scale", f"{choice.scale:g} of no LoRA: {NO_LORA!r} takes none")
        return None, 1.0
    lora = catalog.lora(choice.name)
    if lora is None:
        raise bad_field("lora", f"{choice.name[:64]!r} is not one of {', '.join((*catalog.lora_names, NO_LORA))}")
    if not lora.plays(steps):
        at = ", ".join(map(str, lora.timesteps))
        raise bad_field(
            "num_inference_steps", f"{steps}: LoRA {lora.name!r} is for {len(lora.timesteps)} alone, at timesteps {at}"
        )
    return lora, choice.scale


def _lora_of_model(model: str | None, catalog: Catalog) -> str | None:
    if model is None or model in (catalog.id, *catalog.aliases):
        return None
    base, _, lora = model.partition(":")
    if base != catalog.id or lora not in (*catalog.lora_names, NO_LORA):
        raise ApiError(
            404, f"model: {model[:128]!r} is not served here; GET /v1/models lists what is", "model", "model_not_found"
        )
    return lora


def _eta(request: GenerationRequest, lora: LoRAInfo | None, steps: int, settings: Settings) -> float:
    """TCD's gamma, or DDIM's eta. LCM has none to set: it puts all noise back before the next step."""
    given = request.eta
    if lora is not None and lora.sampler == "LCMScheduler":
        if given not in (None, 1.0, lora.eta) and steps > 1:
            raise bad_field("eta", f"LoRA {lora.name!r} is sampled by LCM, which puts all noise back: 1 alone")
        return lora.eta if given is None else given
    return default_eta(lora, settings) if given is None else given


def default_eta(lora: LoRAInfo | None, settings: Settings) -> float:
    """Of a request that gives none."""
    if settings.model.eta is None or (lora is not None and lora.sampler == "LCMScheduler"):
        return lora.eta if lora else 0.0
    return settings.model.eta


def default_guidance(lora: LoRAInfo | None, settings: Settings) -> float:
    """Of a request that gives none. The bare base is as it always was: guided only where that is asked for."""
    return settings.model.guidance if lora is not None and lora.keeps_guidance else 1.0


def _guidance(
    request: GenerationRequest, lora: LoRAInfo | None, settings: Settings, catalog: Catalog
) -> tuple[float, str]:
    guidance = default_guidance(lora, settings) if request.guidance_scale is None else request.guidance_scale
    negative = request.negative_prompt or ""
    for name, given in (("guidance_scale", guidance != 1), ("negative_prompt", bool(negative))):
        if given and lora is not None and not lora.keeps_guidance:
            able = [other.name for other in catalog.loras if other.keeps_guidance] + [NO_LORA]
            raise bad_field(
                name,
                f"LoRA {lora.name!r} has guidance distilled into it and takes none; these do: {', '.join(able)}",
                "unsupported_parameter",
            )
    if guidance > settings.limits.guidance:
        raise bad_field("guidance_scale", f"{guidance:g} is above {settings.limits.guidance:g} (limits.guidance)")
    if negative and guidance == 1:
        raise bad_field("negative_prompt", "does nothing at guidance_scale 1; give one above 1")
    return guidance, negative
