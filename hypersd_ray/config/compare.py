"""The configuration of a comparison of methods: which, with what budget, and how they are judged."""

from __future__ import annotations

from pydantic import Field, model_validator

from hypersd_ray.config.base import CombinationError, Strict
from hypersd_ray.config.data import ActorPool
from hypersd_ray.config.evaluate import JudgesConfig


class CompareConfig(Strict):
    """Every method is trained at each learning rate with the first seed, then with the other seeds at its best rate, and all
    are judged by one harness."""

    teacher: str
    """Folder of the base model in diffusers' layout."""
    methods: tuple[str, ...]
    """Names of recipes (hypersd_ray/recipes/methods.py)."""
    budget: int = Field(ge=32)
    """Images through the teacher, of every training of every method."""
    shards: str = ""
    """Training pictures (any shards of data.shards) in place of the recipes' own."""
    rates: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    """Learning rates of the sweep, as factors of the method's own."""
    extend: int = Field(default=0, ge=0)
    """Rates that each method may have beyond those, one after the other, while the best so far is at an edge."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the trainings; the sweep has the first."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Sampling steps."""
    noisy_steps: tuple[int, ...] = ()
    """Numbers of steps at which all noise between two steps is new (TCD's gamma = 1) where a method's sampler has gamma: TCD,
    TSCD and what is built on it. At others they add none; LCM, Turbo and DMD always do, the rest never."""
    select: str = "clip_score"
    """The judge whose mean, over the numbers of `steps` that a method is made for, chooses its learning rate. One that a method
    of the comparison learns from is refused."""
    selection_prompts: int = Field(default=128, ge=2)
    """Captions of the training pictures on which the rate is chosen; the held-out ones are for the table alone."""
    prompts: int = Field(default=512, ge=2)
    """Held-out prompts of the table."""
    baseline: str = "teacher"
    """What the report's differences are to: the teacher in its many steps, or one of `methods` at the same number of steps."""
    judges: JudgesConfig = JudgesConfig()
    """Weights of the judges; all empty takes the embedded ones."""
    latency_repeats: int = Field(default=5, ge=0)
    """Pictures over which latency is measured."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs of each training; with a share, several processes train beside each other on one. 0 trains on the CPU. The
    pools below have settings of their own."""
    generators: ActorPool = ActorPool(batch_size=64, max_size=None)
    """Actors that make pictures."""
    scorers: ActorPool = ActorPool(batch_size=64, max_size=None)
    """Actors that judge them."""
    per_shard: int = Field(default=64, ge=1)
    """Pictures of one file."""
    out: str
    """Folder for runs, pictures, scores and the report; a comparison that is there goes on."""
    plan: bool = False
    """Only say what is done and what is to do."""
    minutes: float | None = Field(default=None, gt=0)
    """Begin no further training after so long; the same command goes on."""
    pieces: int | None = Field(default=None, ge=1)
    """Train at most so many pieces now."""
    partial: bool = False
    """Report on what is there, although pieces are missing."""

    @model_validator(mode="after")
    def _fits(self) -> CompareConfig:
        for field in ("methods", "rates", "seeds", "steps"):
            values = getattr(self, field)
            if not values or len(set(values)) < len(values):
                raise CombinationError(f"{field}={values}: at least one, and none twice")
        if self.baseline not in ("teacher", *self.methods):
            raise CombinationError(f"baseline={self.baseline}: teacher, or one of methods={', '.join(self.methods)}")
        if self.judges.lpips:
            raise CombinationError(
                f"judges.lpips={self.judges.lpips}: a comparison has one picture of a prompt and training; "
                "jobs/evaluate.py --images-per-prompt 2 measures it"
            )
        return self
