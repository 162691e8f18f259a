"""Where image-text pairs come from, which are kept, who encodes them and how they are streamed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from hypersd_ray.config.base import Strict


class FilterConfig(Strict):
    """Which rows are kept. A filter that is None is off; the scores are columns of LAION's and COYO's metadata."""

    min_side: int | None = Field(default=None, ge=1)
    """Pixels of the shorter side before resizing, at least."""
    min_aesthetic: float | None = None
    """LAION aesthetics predictor, at least (aesthetic, AESTHETIC_SCORE, aesthetic_score_laion_v2)."""
    max_watermark: float | None = Field(default=None, ge=0, le=1)
    """Probability of a watermark, at most (pwatermark, watermark_score)."""
    max_nsfw: float | None = Field(default=None, ge=0, le=1)
    """Probability of unsafe content, at most (punsafe, nsfw_score_opennsfw2, nsfw_score_gantman)."""
    min_similarity: float | None = Field(default=None, ge=-1, le=1)
    """CLIP similarity of image and text, at least (similarity, clip_similarity_vitb32, clip_similarity_vitl14)."""
    min_sharpness: float | None = Field(default=None, ge=0)
    """Variance of the grey image's Laplacian before resizing (grey values 0..255), at least. Needs no metadata."""
    missing: Literal["keep", "reject"] = "keep"
    """What to do with a row whose metadata lacks a score that a filter asks for."""


class ActorPool(Strict):
    """Ray actors that do one kind of work side by side. Their resources may be other machines' than the trainer's."""

    min_size: int = Field(default=1, ge=1)
    """Actors at the start."""
    max_size: int | None = Field(default=1, ge=1)
    """Actors at most, when the pipeline is busy. None: as many as nodes can hold one, or as there is room on GPUs, when it begins."""
    num_cpus: float = Field(default=1, ge=0)
    """CPU cores reserved for each actor."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs (or a share of one) reserved for each actor; 0 works on the CPU."""
    batch_size: int = Field(default=32, ge=1)
    """Images that an actor takes at once."""
    label_selector: dict[str, str] = Field(default_factory=dict)
    """Ray node labels that the actors' nodes must have, e.g. {"ray.io/accelerator-type": "L4"}."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the actors' networks; encoded rows are float16 in any case."""

    @model_validator(mode="after")
    def _sizes_in_order(self) -> ActorPool:
        if self.max_size is not None and self.max_size < self.min_size:
            raise ValueError(f"max_size={self.max_size} is below min_size={self.min_size}: raise max_size")
        return self


class DataConfig(Strict):
    """Image-text shards and the way they become batches."""

    shards: str | tuple[str, ...]
    """Image-text shards: a folder, a file, a pattern (*.tar, {00000..00010}.tar), any fsspec URL; or several."""
    format: Literal["auto", "webdataset", "parquet", "latents"] = "auto"
    """"auto" goes by the suffix, and by latents.json in the folder, which jobs/precompute.py leaves."""
    resolution: int = Field(default=512, ge=8)
    """Pixels a side: the short side is resized to it, then the centre is cropped."""
    filters: FilterConfig = FilterConfig()
    """Which rows are kept."""
    max_reject_share: float = Field(default=0.5, ge=0, le=1)
    """The job stops when more than this share of the rows is rejected."""
    reject_grace: int = Field(default=200, ge=0)
    """Rows seen before max_reject_share counts. A lost shard counts as many as the whole ones have in the mean."""
    reader_cpus: float = Field(default=0.5, ge=0)
    """CPU cores reserved by each reading task. The cluster needs at least this much beside the training workers. 0 reserves
    none: two tasks at a time then."""
    encoder: ActorPool = ActorPool()
    """The actors that encode images and captions; a pool for each training worker."""
    cache: Literal["none", "disk"] = "none"
    """"disk": encode once into cache_dir and read that from then on; "none": encode while training."""
    cache_dir: str | None = None
    """Where "disk" keeps its latents, any fsspec URL; None is the run's own folder."""
    shards_per_window: int = Field(default=8, ge=1)
    """Shards read as one unit; a resumed run reads at most this many again."""
    shuffle_rows: int = Field(default=4096, ge=1)
    """Rows permuted together, held in memory by every worker; 1 keeps the order within a window."""
    prefetch_batches: int = Field(default=4, ge=1)
    """Batches made ready ahead of the trainer."""

    @field_validator("shards")
    @classmethod
    def _some_shards(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value or not all([value] if isinstance(value, str) else value):
            raise ValueError("shards is empty: name a file, a folder or a pattern")
        return value

    @property
    def patterns(self) -> tuple[str, ...]:
        """`shards` as a tuple."""
        return (self.shards,) if isinstance(self.shards, str) else self.shards
