"""The kinds of training that run in the same loop, by name. A new one is a file here and a line below."""

from hypersd_ray.trainer.kinds import feedback, onestep, tscd
from hypersd_ray.trainer.kinds.base import AnyConfig, Kind

KINDS: dict[str, Kind] = {"tscd": tscd.KIND, "onestep": onestep.KIND, "feedback": feedback.KIND}


def kind_of(config: AnyConfig) -> str:
    """The name of a configuration's kind."""
    return next(name for name, kind in KINDS.items() if kind.config is type(config))
