"""An image set from a list of prompts, made by a base model over Ray Data: shards that every other job reads.

One shard is one task: an actor makes its images and writes the tar by itself, whole or not at all, so that a run that
was killed goes on with the shards that are missing. No image goes through the object store.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import ray.data

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.synthesize import SynthesizeConfig
from hypersd_ray.data.files import absolute, write_json, write_whole
from hypersd_ray.data.pools import actors
from hypersd_ray.models.checkpoint import read_base

MARKER = "synthesize.json"
"""What made the images of a folder; a run with other settings is refused there."""


@dataclass(frozen=True)
class Made:
    """What `synthesize` did."""

    out: str
    shards: int
    shards_skipped: int
    images: int


def read_prompts(path: str) -> list[str]:
    """The prompts of a text file (one a line, empty lines are none) or of a parquet file.

    Raises:
        ConfigError: it cannot be read, or holds none.
    """
    try:
        with fsspec.open(path, "rb") as file:
            if path.endswith(".parquet"):
                table = pq.read_table(file)
                column = next((c for c in ("caption", "prompt", "text", "TEXT") if c in table.column_names), None)
                if column is None:
                    raise ConfigError(
                        f"prompts={path} has the columns {', '.join(table.column_names)}: name one caption"
                    )
                lines = [str(value or "") for value in table[column].to_pylist()]
            else:
                lines = file.read().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts={path} cannot be read: {' '.join(str(error).split())}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"prompts={path} holds no prompt: one a line")
    return prompts


def image_seed(seed: int, prompt: str, number: int) -> int:
    """Of one image, whatever it is made beside."""
    digest = hashlib.sha256(f"{seed}\0{number}\0{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def check(config: SynthesizeConfig) -> list[str]:
    """What can be known before Ray starts: the prompts.

    Raises:
        ConfigError, ValueError: prompts or a model that are not there, or an `out` whose images were made otherwise.
    """
    read_base(config.model)
    prompts = read_prompts(config.prompts)
    filesystem, root = fsspec.core.url_to_fs(config.out.rstrip("/"))
    if not filesystem.exists(f"{root}/{MARKER}"):
        return prompts
    with filesystem.open(f"{root}/{MARKER}", "r", encoding="utf-8") as file:
        theirs = json.load(file)
    for name, value in _marker(config, prompts).items():
        if theirs.get(name) != value:
            raise ConfigError(
                f"out={config.out} holds images made with {name}={theirs.get(name)!s:.60}, not {value!s:.60}: name another folder"
            )
    return prompts


def synthesize(config: SynthesizeConfig, progress: Callable[[int, int, int], None] | None = None) -> Made:
    """Make what is missing in `config.out`. `progress(shards done, shards in all, images made)`. Raises: as `check`."""
    prompts, out = check(config), config.out.rstrip("/")
    images = [(prompt, number) for prompt in prompts for number in range(config.images_per_prompt)]
    shards = [images[i : i + config.per_shard] for i in range(0, len(images), config.per_shard)]
    filesystem, root = fsspec.core.url_to_fs(out)
    filesystem.makedirs(root, exist_ok=True)
    if not filesystem.exists(f"{root}/{MARKER}"):
        write_json(filesystem, f"{root}/{MARKER}", _marker(config, prompts))
    todo = [i for i in range(len(shards)) if not filesystem.exists(f"{root}/{_name(i)}")]
    done, made = len(shards) - len(todo), 0
    if todo:
        items = [{"shard": i, "images": json.dumps(shards[i])} for i in todo]
        settings = config.model_dump() | {"model": str(Path(config.model).resolve()), "out": absolute(out)}
        written = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            ShardMaker,
            fn_constructor_kwargs={"config": settings},
            batch_size=1,
            **actors(config.pool),
        )
        for row in written.iter_rows():
            done, made = done + 1, made + int(row["images"])
            if progress is not None:
                progress(done, len(shards), made)
    return Made(config.out, len(shards), len(shards) - len(todo), made)


def _name(shard: int) -> str:
    return f"{shard:05d}.tar"


def _marker(config: SynthesizeConfig, prompts: Sequence[str]) -> dict[str, Any]:
    """How the images are made."""
    return config.model_dump(exclude={"out", "pool", "model", "prompts"}) | {
        "model": read_base(config.model).path.name,
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
    }


class ShardMaker:
    """For `map_batches`: {"shard": [i], "images": [prompts and numbers as JSON]} -> how many images it wrote."""

    def __init__(self, config: dict[str, Any]):
        import torch
        from diffusers import DiffusionPipeline

        self.config = SynthesizeConfig.model_validate(config)
        self.device = "cuda" if self.config.pool.num_gpus else "cpu"
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.config.precision]
        checker = {"safety_checker": None} if read_base(self.config.model).family == "sd" else {}
        self.pipe = DiffusionPipeline.from_pretrained(
            self.config.model, torch_dtype=dtype, local_files_only=True, use_safetensors=True, **checker
        ).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        counts = [
            self._shard(int(shard), [(str(p), int(n)) for p, n in json.loads(images)])
            for shard, images in zip(batch["shard"], batch["images"], strict=True)
        ]
        return {"shard": [int(s) for s in batch["shard"]], "images": counts}

    def _shard(self, shard: int, images: Sequence[tuple[str, int]]) -> int:
        filesystem, root = fsspec.core.url_to_fs(self.config.out)
        path = f"{root}/{_name(shard)}"
        with write_whole(filesystem, path) as file, tarfile.open(fileobj=file, mode="w|") as tar:
            for first in range(0, len(images), self.config.pool.batch_size):
                part = images[first : first + self.config.pool.batch_size]
                for i, (picture, about) in enumerate(self._generate(part), start=first):
                    key = f"{shard:05d}{i:06d}"
                    self._add(tar, f"{key}.{self.config.image_format}", self._encoded(picture))
                    self._add(tar, f"{key}.txt", about["prompt"].encode())
                    self._add(tar, f"{key}.json", json.dumps(about | {"key": key}).encode())
        return len(images)

    def _generate(self, images: Sequence[tuple[str, int]]) -> list[tuple[Any, dict[str, Any]]]:
        """Pictures and what is known of each. One generator an image: it does not depend on its batch."""
        import torch

        c = self.config
        seeds = [image_seed(c.seed, prompt, number) for prompt, number in images]
        pictures = self.pipe(
            prompt=[prompt for prompt, _ in images],
            negative_prompt=[c.negative_prompt] * len(images) if c.negative_prompt else None,
            num_inference_steps=c.steps,
            guidance_scale=c.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
        return [
            (
                picture,
                {"prompt": prompt, "seed": seed, "steps": c.steps, "guidance": c.guidance,
                 "width": picture.width, "height": picture.height},
            )
            for picture, (prompt, _), seed in zip(pictures, images, seeds, strict=True)
        ]  # fmt: skip

    def _encoded(self, picture: Any) -> bytes:
        data = io.BytesIO()
        kind = {"png": "PNG", "webp": "WEBP", "jpg": "JPEG"}[self.config.image_format]
        options: dict[str, dict[str, Any]] = {"webp": {"lossless": True}, "jpg": {"quality": 95}}
        picture.save(data, kind, **options.get(self.config.image_format, {}))
        return data.getvalue()

    @staticmethod
    def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
