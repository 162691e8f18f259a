"""Ray's label selectors, as far as they can be held against a node's labels without Ray's scheduler."""

from __future__ import annotations

from collections.abc import Mapping


def is_operator(value: str) -> bool:
    """ "!x" and "in(a, b)": these are left to Ray's scheduler."""
    return value.startswith("!") or "(" in value


def has_labels(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels are what `selector` says, its operators aside."""
    return all(labels.get(k) == v for k, v in selector.items() if not is_operator(v))
