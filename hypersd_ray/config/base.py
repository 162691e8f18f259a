"""What every config model is built on."""

import pydantic


class ConfigError(ValueError):
    """A user's setting that cannot work: one line with the field, the value, the limit and the knob to turn."""


class CombinationError(Exception):
    """Fields that are each right and cannot be together: one line.

    Not a ValueError, so that neither pydantic nor tyro wraps it into a page of its own.
    """


class RunError(RuntimeError):
    """A run that started and cannot go on: one line with what happened, where it stands and what to change."""


class Stopped(RunError):
    """A run that was told to stop, and left a checkpoint."""


class Strict(pydantic.BaseModel):
    """A frozen model in which an unknown field is an error and defaults are validated like given values."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True)
