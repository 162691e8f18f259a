"""Make the COCO-5k manifest from COCO's own annotation file: one caption a picture, and the seed of its noise.

Examples:

    python jobs/coco5k.py --annotations annotations/captions_val2017.json --out data/coco5k.parquet
    python jobs/evaluate.py MODEL --prompts coco5k --prompts-file data/coco5k.parquet ...
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not

from pydantic import Field

from hypersd_ray.config.base import ConfigError, Strict
from hypersd_ray.config.cli import read_options, run_job


class ManifestConfig(Strict):
    """What to read and where to write."""

    annotations: Path
    """captions_val2017.json of annotations_trainval2017.zip."""
    out: Path = Path("data/coco5k.parquet")
    """The manifest."""
    images: int = Field(default=5000, ge=0)
    """Pictures that it must have; 0 takes any number."""


def main() -> None:
    """Write the manifest and say what is in it."""
    config: ManifestConfig = read_options(ManifestConfig, sys.argv[1:], __doc__ or "")
    import pyarrow.parquet as pq

    from evaluation.harness.prompts import coco_manifest

    table = coco_manifest(config.annotations, config.images)
    try:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, config.out)
    except OSError as error:
        raise ConfigError(f"--out {config.out} cannot be written: {error.strerror or error}") from None
    print(f"{len(table)} captions in {config.out}, the first: {table['caption'][0].as_py()!r}")


if __name__ == "__main__":
    run_job(main)
