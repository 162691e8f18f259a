"""The JSON schema of a request as this server takes it: what the API's description and its checkers read."""

from __future__ import annotations

from typing import Any

from serve.api import GenerationRequest
from serve.catalog import Catalog
from serve.settings import NO_LORA, Settings


def request_schema(settings: Settings, catalog: Catalog) -> dict[str, Any]:
    """The body's JSON schema, with this server's limits in it."""
    schema = GenerationRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    fields = schema["properties"]
    fields["prompt"] |= {"maxLength": settings.limits.prompt_chars}

    def narrow(name: str, **changes: Any) -> None:
        fields[name]["anyOf"][0].update(changes)

    narrow("n", maximum=settings.limits.images)
    narrow("num_inference_steps", maximum=settings.limits.steps)
    narrow("size", enum=["auto", *catalog.sizes])
    narrow("guidance_scale", maximum=settings.limits.guidance)
    narrow("negative_prompt", maxLength=settings.limits.prompt_chars)
    models = [catalog.id, *catalog.aliases, *(f"{catalog.id}:{name}" for name in (*catalog.lora_names, NO_LORA))]
    narrow("model", enum=models)
    names = {"type": "string", "enum": [*catalog.lora_names, NO_LORA]}
    scale = {"type": "number", "minimum": 0, "maximum": settings.limits.lora_scale, "default": 1.0}
    choice = {
        "type": "object", "properties": {"name": names, "scale": scale}, "required": ["name"], "additionalProperties": False,
    }  # fmt: skip
    fields["lora"]["anyOf"] = [names, choice, {"type": "null"}]
    if catalog.controlnets:
        narrow("control", enum=[*catalog.controlnets])
    else:
        for name in ("control", "control_image", "control_scale"):
            fields[name]["anyOf"] = [{"type": "null"}]
    return schema
