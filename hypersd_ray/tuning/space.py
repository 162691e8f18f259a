"""The numbers that a sweep varies, and the configuration that a choice of them stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ray import tune

from hypersd_ray.config.sweep import LOGARITHMIC, SpaceConfig
from hypersd_ray.config.tscd import AdversarialConfig, TSCDConfig

Point = Mapping[str, float]
"""Name of a number in `SpaceConfig` -> its value."""


def searched(space: SpaceConfig) -> dict[str, Any]:
    """Ray Tune's search space; what is held still is not in it."""
    found = {}
    for name in SpaceConfig.model_fields:
        low, high = getattr(space, name)
        if low < high:
            found[name] = tune.loguniform(low, high) if name in LOGARITHMIC else tune.uniform(low, high)
    return found


def held(space: SpaceConfig) -> dict[str, float]:
    """What is held still."""
    return {n: getattr(space, n)[0] for n in SpaceConfig.model_fields if getattr(space, n)[0] == getattr(space, n)[1]}


def point_of(base: TSCDConfig) -> dict[str, float]:
    """The numbers that stand for the base itself."""
    a = base.adversarial
    return {
        "adv_end": a.adv_end / (a.mse_start or 1.0), "adv_start_share": a.adv_start / a.adv_end if a.adv_end else 0.0,
        "mse_end": a.mse_end / (a.mse_start or 1.0), "shape": a.shape,
        "lr": 1.0, "omega_centre": 1.0, "omega_width": 1.0, "ema_gap": 1.0,
    }  # fmt: skip


def applied(base: TSCDConfig, point: Point) -> TSCDConfig:
    """`base` with the numbers of `point`; what it does not name stays.

    Raises:
        CombinationError, pydantic.ValidationError: no run can have them.
    """
    full = point_of(base) | dict(point)
    d = base.distill
    centre = (d.omega_min + d.omega_max) / 2 * full["omega_centre"]
    half = (d.omega_max - d.omega_min) / 2 * full["omega_width"]
    distill = d.model_copy(update={
        "omega_min": max(1.0, centre - half), "omega_max": max(1.0, centre + half),
        "ema_decay": min(1 - 1e-6, max(0.0, 1 - (1 - d.ema_decay) * full["ema_gap"])),
    })  # fmt: skip
    adversarial = AdversarialConfig.model_validate(
        base.adversarial.model_dump()
        | {
            "adv_end": full["adv_end"], "adv_start": full["adv_end"] * full["adv_start_share"],
            "mse_start": 1.0, "mse_end": full["mse_end"], "shape": full["shape"],
        }
    )  # fmt: skip
    optim = base.optim.model_copy(update={"lr": base.optim.lr * full["lr"]})
    made = base.model_copy(update={"distill": distill, "adversarial": adversarial, "optim": optim})
    return TSCDConfig.model_validate(made.model_dump())


def readable(base: TSCDConfig, point: Point) -> dict[str, float]:
    """The settings behind `point`, for a table: what `jobs/tscd.py` calls them, rounded to 4 digits."""
    config = applied(base, point)
    a, d = config.adversarial, config.distill
    values = {
        "adv_start": a.adv_start, "adv_end": a.adv_end, "mse_end": a.mse_end, "shape": a.shape, "lr": config.optim.lr,
        "omega_min": d.omega_min, "omega_max": d.omega_max, "ema_decay": d.ema_decay,
    }  # fmt: skip
    return {name: float(f"{value:.4g}") if math.isfinite(value) else value for name, value in values.items()}
