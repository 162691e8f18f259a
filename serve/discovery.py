"""What there is to serve, read off the base's folder and the LoRA files without loading a weight."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

from hypersd_ray.config.base import ConfigError
from hypersd_ray.embedded import paths
from hypersd_ray.models.checkpoint import BaseInfo, Family, read_base
from hypersd_ray.models.lora_file import GUIDANCE, KEPT, read_metadata
from hypersd_ray.recipes import TINY_PROMPTS
from serve.catalog import SCHEDULERS, Catalog, LoRAInfo, Scheduler
from serve.settings import AUTO_LORA, EMBEDDED, NO_LORA, SIZE, ModelSettings


def read_catalog(settings: ModelSettings) -> Catalog:
    """Look at the files that `settings` names.

    Raises:
        ConfigError: a folder or file is not what it should be; one line.
    """
    folder = paths.TEACHER if settings.base == EMBEDDED else Path(settings.base)
    try:
        info = read_base(folder)
    except ValueError as error:
        raise ConfigError(f"model.base={settings.base}: {str(error).replace('--teacher', 'it')}") from None
    loras = tuple(_lora(path, settings, info.family) for path in _lora_files(settings.loras))
    names = [lora.name for lora in loras]
    for name in names:
        if names.count(name) > 1 or name in (NO_LORA, AUTO_LORA):
            raise ConfigError(f"model.loras: two LoRAs are named {name!r}, or the name is reserved; rename a file")
    if settings.default_lora not in (AUTO_LORA, NO_LORA, *names):
        raise ConfigError(f"model.default_lora={settings.default_lora!r} is not among {_listed(names)}")
    unknown = sorted(set(settings.keeps_guidance) - set(names))
    if unknown:
        raise ConfigError(f"model.keeps_guidance names {unknown[0]!r}, which is not among {_listed(names)}")
    for name, path in settings.controlnets.items():
        if not (Path(path) / "config.json").is_file():
            raise ConfigError(f"model.controlnets.{name}={path}: {path}/config.json does not exist")
    return Catalog(
        id=settings.id,
        aliases=settings.aliases,
        base=str(folder),
        family=info.family,
        sizes=_sizes(settings, info),
        loras=loras,
        default_lora=settings.default_lora,
        controlnets=settings.controlnets,
        examples=_examples(settings),
        created=int((folder / "model_index.json").stat().st_mtime),
    )


def _lora_files(given: Iterable[str]) -> list[Path]:
    """The files that are named, and those in the folders that are."""
    files = []
    for entry in given:
        path = paths.LORAS if entry == EMBEDDED else Path(entry)
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            found = sorted(path.glob("*.safetensors"))
            # a run's folder has every LoRA twice; the other layout holds the same numbers
            files += [f for f in found if not (f.stem.endswith("-kohya") and f.with_stem(f.stem[:-6]) in found)]
        elif entry != EMBEDDED:
            raise ConfigError(f"model.loras: {entry} does not exist: name a .safetensors file or a folder of them")
    return files


def _lora(path: Path, settings: ModelSettings, family: Family) -> LoRAInfo:
    try:
        metadata = read_metadata(path)
    except ValueError as error:
        raise ConfigError(f"model.loras: {error}") from None
    keeps = path.stem in settings.keeps_guidance
    if metadata is None:
        return LoRAInfo(name=path.stem, path=str(path), keeps_guidance=keeps)
    if metadata.family != family:
        raise ConfigError(f"model.loras: {path} is for family {metadata.family}, model.base is {family}")
    if metadata.scheduler not in SCHEDULERS:
        raise ConfigError(
            f"model.loras: {path} is to be sampled by {metadata.scheduler!r}; this server has {', '.join(SCHEDULERS)}"
        )
    return LoRAInfo(
        name=path.stem,
        path=str(path),
        k=metadata.k,
        steps=metadata.steps,
        eta=metadata.eta,
        keeps_guidance=keeps or metadata.extra.get(GUIDANCE) == KEPT,
        scheduler=cast(Scheduler, metadata.scheduler),
        timesteps=metadata.timesteps,
    )


def _examples(settings: ModelSettings) -> tuple[str, ...]:
    if settings.examples is not None:
        return settings.examples
    return TINY_PROMPTS if settings.base == EMBEDDED else ()


def _sizes(settings: ModelSettings, info: BaseInfo) -> tuple[str, ...]:
    """The accepted sizes, each one that the network can do."""
    factor, unet = info.latent_factor, info.unet_config
    native = unet["sample_size"] * factor
    multiple = factor * 2 ** (len(unet["block_out_channels"]) - 1)
    for size in settings.sizes:
        width, height = map(int, SIZE.match(size).groups())  # type: ignore[union-attr]
        if width % multiple or height % multiple:
            raise ConfigError(f"model.sizes: {size} is not in multiples of {multiple}, which this base needs")
    return settings.sizes or (f"{native}x{native}",)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none (there is no LoRA)"
