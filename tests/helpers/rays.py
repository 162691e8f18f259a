"""A Ray of the tests' own in their process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from hypersd_ray.trainer.local import dashboard_options


@contextmanager
def own_ray(num_cpus: int = 4, dashboard: bool = False, **options: Any) -> Iterator[None]:
    """Ends with the block. None may run before: whoever came later would share one of other resources, without a dashboard."""
    chosen = dashboard_options() if dashboard else {"include_dashboard": False}
    ray.init("local", num_cpus=num_cpus, log_to_driver=False, logging_level="ERROR", **chosen, **options)
    try:
        yield
    finally:
        ray.shutdown()
        if dashboard:
            del os.environ["RAY_API_SERVER_ADDRESS"]
