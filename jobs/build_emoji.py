"""Build the embedded world's shards and annotations from npm's emoji packages.

    npm install emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
    pip install -e '.[data]'
    python jobs/build_emoji.py --node-modules node_modules --out hypersd_ray/embedded/data

The shards that this makes with its defaults are committed, so nobody needs npm to train.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, installed or not


from hypersd_ray.config.base import Strict
from hypersd_ray.config.cli import read_options, run_job
from hypersd_ray.embedded.catalogue import common_objects, load_catalogue


class BuildConfig(Strict):
    """What to draw; every picture is a function of (seed, split, index)."""

    node_modules: Path
    """Where npm installed the four packages."""
    out: Path
    """Folder for the shards and annotations."""
    train: int = 3584
    val: int = 640
    size: int = 32
    """Pixels a side."""
    styles: tuple[str, ...] = ("noto", "twemoji")
    """Fluent ("fluent") is kept for trials on another base model."""
    pairs: float = 0.25
    """Share of pictures with two objects."""
    per_shard: int = 512
    per_subgroup: int = 12
    """At most this many objects of each subgroup; 0 takes all 857 objects of the five categories."""
    seed: int = 0


def main() -> None:
    """Build both splits."""
    config: BuildConfig = read_options(BuildConfig, sys.argv[1:], __doc__ or "")
    from hypersd_ray.embedded import shards  # after the options: it writes with an extra's package

    catalogue = load_catalogue(config.node_modules)
    objects = common_objects(catalogue, config.per_subgroup) if config.per_subgroup else catalogue
    categories = sorted({e.subgroup for e in objects})
    for split, count in (("train", config.train), ("val", config.val)):
        drawn = shards.pictures(objects, split, count, config.size, config.styles, config.pairs, config.seed)
        made = shards.write_split(config.out, split, drawn, config.per_shard, categories)
        print(f"{split}: {made} pictures of {len(objects)} objects in {config.out}")
    shards.write_objects(config.out, objects)
    (config.out / "build.txt").write_text(
        "\n".join(f"{k} = {v}" for k, v in config.model_dump().items() if k not in ("node_modules", "out")) + "\n"
    )


if __name__ == "__main__":
    run_job(main)
