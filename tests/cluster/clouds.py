"""A node's settings held against the clouds' own descriptions of their APIs, which their client libraries ship."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

import botocore.loaders
import botocore.model
import botocore.validate

RAYS_OWN = ("SubnetIds",)
"""What Ray reads and does not pass on to EC2."""


@cache
def _ec2() -> botocore.model.ServiceModel:
    return botocore.model.ServiceModel(botocore.loaders.Loader().load_service_model("ec2", "service-2"))


def ec2_complaints(node_config: dict[str, Any]) -> list[str]:
    """What EC2's RunInstances would not take: unknown fields, wrong types, instance types that do not exist."""
    request = {name: value for name, value in node_config.items() if name not in RAYS_OWN}
    shape = _ec2().operation_model("RunInstances").input_shape
    report = botocore.validate.ParamValidator().validate(request | {"MinCount": 1, "MaxCount": 1}, shape)
    complaints = report.generate_report().splitlines()
    return complaints + list(_outside_enums(request, shape, ""))


def _outside_enums(value: Any, shape: Any, path: str) -> Iterator[str]:
    """botocore leaves enumerations to the service."""
    if shape.type_name == "structure" and isinstance(value, dict):
        for name, inner in value.items():
            if name in shape.members:
                yield from _outside_enums(inner, shape.members[name], f"{path}.{name}")
    elif shape.type_name == "list" and isinstance(value, list):
        for inner in value:
            yield from _outside_enums(inner, shape.member, path)
    elif shape.type_name == "string" and shape.enum and value not in shape.enum:
        yield f"{path.lstrip('.')}: {value!r} is not one of {len(shape.enum)} values"


@cache
def _compute() -> dict[str, Any]:
    document = files("googleapiclient") / "discovery_cache/documents/compute.v1.json"
    return json.loads(document.read_text())["schemas"]


def compute_complaints(node_config: dict[str, Any]) -> list[str]:
    """What Compute Engine's instances.insert would not take: unknown fields, wrong types, values outside enumerations."""
    return list(_wrong(node_config, {"$ref": "Instance"}, ""))


def _wrong(value: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    if "$ref" in schema:
        schema = _compute()[schema["$ref"]]
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
    written = "string" if schema.get("format") in ("int64", "uint64") else schema["type"]  # JSON has no 64-bit numbers
    if not isinstance(value, kinds[schema["type"]]) and not (written == "string" and isinstance(value, int)):
        yield f"{path.lstrip('.')}: {value!r} is not of type {schema['type']}"
    elif isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        for name, inner in value.items():
            if name in known or others:
                yield from _wrong(inner, known.get(name, others), f"{path}.{name}")
            else:
                yield f"{path.lstrip('.')}: unknown field {name!r}"
    elif isinstance(value, list):
        for inner in value:
            yield from _wrong(inner, schema["items"], path)
    elif schema.get("enum") and value not in schema["enum"]:
        yield f"{path.lstrip('.')}: {value!r} is not one of {', '.join(schema['enum'])}"
