"""Make the environment in which the authors' own ImageReward runs, beside the project's (some 400 MB, torch is shared).

    python jobs/image_reward_env.py --out /shared/image-reward
    python jobs/feedback.py sd15 --reward image_reward_package --image-reward-python /shared/image-reward/bin/python ...

The folder must be at one path on every node that may run the actor. The project's own ImageReward (`image_reward`, the
default) gives the same scores without it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not


from hypersd_ray.config.base import ConfigError, RunError, Strict
from hypersd_ray.config.cli import read_options, run_job


class EnvironmentConfig(Strict):
    """Where to make it."""

    out: Path
    """A folder that is not there yet."""


def main() -> None:
    """Make it, say its interpreter."""
    config: EnvironmentConfig = read_options(EnvironmentConfig, sys.argv[1:], __doc__ or "")
    if config.out.exists():
        raise ConfigError(f"--out {config.out} exists: name a new folder, or remove it first")
    from hypersd_ray.models.rewards.image_reward_package import make_environment

    try:
        python = make_environment(config.out)
    except RuntimeError as error:
        raise RunError(str(error)) from None
    print(f"interpreter  {python.absolute()}")  # not resolved: it is a link to the one that runs now


if __name__ == "__main__":
    run_job(main)
