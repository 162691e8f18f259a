"""What each part of TSCD is good for: the embedded recipe with one part changed, trained and judged as the methods are.

python jobs/compare.py ablations
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hypersd_ray.config.tscd import AdversarialConfig
from hypersd_ray.recipes.methods import BATCH, BUDGET, Chain, of_settings, run_name
from hypersd_ray.recipes.trajectory import Settings
from hypersd_ray.recipes.tscd import short_tscd


def changed(
    name: str,
    distill: dict[str, Any] | None = None,
    adversarial: AdversarialConfig | None = None,
    budget: int = BUDGET,
    lr: float = 1e-3,
    seed: int = 0,
) -> Chain:
    """TSCD (MSE alone, no noise perturbation, the stage before as teacher) but for `distill` and `adversarial`."""
    base = short_tscd(budget // BATCH)
    settings = Settings(base.distill.model_copy(update=distill or {}), adversarial or base.adversarial)
    if settings.distill.k_list == (1,):
        settings = Settings(
            settings.distill.model_copy(update={"n_list": base.distill.n_list[:1], "steps_list": (budget // BATCH,)}),
            settings.adversarial,
        )
    return of_settings(run_name(name, lr, seed), settings, lr, seed)


CHANGES: dict[str, dict[str, Any]] = {
    "tscd-one-stage": {"distill": {"k_list": (1,)}},
    "tscd-base": {"distill": {"teacher": "base"}},
    "tscd-segment-start": {"distill": {"t_end": "segment_start"}},
    "tscd-perturbed": {"distill": {"perturbation": 0.1}},
    "tscd-adversarial": {"adversarial": AdversarialConfig()},
    "tscd-flat-weights": {"adversarial": AdversarialConfig(adv_start=0.05, adv_end=0.05, mse_start=0.75, mse_end=0.75)},
    "tscd-adversarial-only": {"adversarial": AdversarialConfig(adv_start=1.0, adv_end=1.0, mse_start=0.0, mse_end=0.0)},
}
"""name -> what is changed."""

ABLATIONS: dict[str, Callable[..., Chain]] = {
    name: partial(changed, name, **change) for name, change in CHANGES.items()
}
"""name -> (budget=, lr=, seed=) -> the run."""
