"""What a step tells, of the micro-batches that it is made of."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def averaged(found: Iterable[dict[str, Tensor]], parts: int) -> dict[str, Tensor]:
    """The means over `parts` micro-batches of what each found, by name; one that has not found something counts as 0."""
    totals: dict[str, Tensor] = {}
    for metrics in found:
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0) + value / parts
    return totals
