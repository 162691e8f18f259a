"""What is evaluated: a base model, a LoRA, a UNet, or a run of ours; and the cell that each number of steps makes of it.

A cell is everything that decides a picture but its prompt. Its key names the folder where its pictures are kept.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.evaluate import EvaluateConfig
from hypersd_ray.models.cards import UNetSampling, read_sampling
from hypersd_ray.models.checkpoint import read_base
from hypersd_ray.models.hashing import sha256_of
from hypersd_ray.models.lora_file import GUIDANCE, KEPT, LoRAMetadata, read_lora, read_metadata
from hypersd_ray.models.samplers import SCHEDULERS, TCD_GRID
from hypersd_ray.trainer.kinds import KINDS, AnyConfig, kind_of
from hypersd_ray.training.samples import Sampling

Kind = Literal["base", "lora", "unet"]
TEACHER = "teacher"
UNET_FILE = "diffusion_pytorch_model.safetensors"
SAMPLERS = {kind.__name__: name for name, kind in SCHEDULERS.items()}
"""What a LoRA's file calls its scheduler -> what `How` does."""


@dataclass(frozen=True)
class How:
    """How a model is sampled.

    Attributes:
        scheduler: "edges" is this project's sampler, the others diffusers' schedulers.
        eta: TCD's gamma.
        guidance: scale, as uncond + guidance (cond - uncond); 1 is none.
        times: "edges": the falling times, where they are not the training edges.
        windows: "edges": windows of a model that flows along straight lines (PeRFlow).
        timesteps: "lcm": the network's inputs of a model that was made for those alone.
    """

    scheduler: str
    eta: float = 0.0
    guidance: float = 1.0
    times: tuple[int, ...] | None = None
    windows: int | None = None
    timesteps: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Cell:
    """A model at a number of steps, from the noise of one seed. See `How` for `how`."""

    model: str
    kind: Kind
    base: str
    weights: str
    base_sha256: str
    weights_sha256: str
    steps: int
    seed: int
    how: How
    dtype: str = "float32"

    @functools.cached_property
    def key(self) -> str:
        """A hash of what decides the pictures: neither the model's name nor where its files lie."""
        what = asdict(replace(self, model="", base="", weights=""))
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]

    @classmethod
    def from_json(cls, text: str) -> Cell:
        """The inverse of `to_json`."""
        values = json.loads(text)
        how: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["how"].items()}
        return cls(**values | {"how": How(**how)})

    def to_json(self) -> str:
        """To travel with Ray's rows, and to lie beside the pictures."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Subject:
    """A model under a name: per number of steps, the file of its weights ("" for the base itself) and how to sample."""

    name: str
    kind: Kind
    base: str
    parts: dict[int, tuple[str, How]]
    notes: dict[str, Any] = field(default_factory=dict)

    def cells(self, seed: int, dtype: str) -> list[Cell]:
        """One a number of steps."""
        base = base_sha256(self.base)
        return [
            Cell(self.name, self.kind, self.base, weights, base, _weights_sha256(weights), steps, seed, how, dtype)
            for steps, (weights, how) in self.parts.items()
        ]


def by_weights(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells of each training, by the hash of its weights: what differs within one is the noise."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.weights_sha256, []).append(cell)
    return found


@functools.lru_cache(maxsize=256)
def _weights_sha256(weights: str) -> str:
    path = Path(weights)
    return "" if not weights else sha256_of(path / UNET_FILE if path.is_dir() else path)


@functools.lru_cache(maxsize=16)
def base_sha256(folder: str) -> str:
    """Of all that decides a pipeline's pictures: weights of UNet, text encoders and autoencoder, their configs, schedule."""
    digest, path = hashlib.sha256(), Path(folder)
    patterns = ("unet/*.safetensors", "text_encoder*/*.safetensors", "vae/*.safetensors", "*/config.json",
                "scheduler/scheduler_config.json", "tokenizer*/*.json")  # fmt: skip
    for file in sorted({file for pattern in patterns for file in path.glob(pattern)}):
        digest.update(f"{file.relative_to(path)} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def teacher(config: EvaluateConfig, steps: Sequence[int]) -> Subject:
    """The base by guided DDIM steps."""
    how = How("edges", guidance=config.teacher_guidance)
    return Subject(TEACHER, "base", str(Path(config.base).resolve()), dict.fromkeys(steps, ("", how)))


def find_subject(spec: str, config: EvaluateConfig) -> Subject:
    """The model that `spec` names: "teacher", a LoRA file, a folder of a pipeline, of a UNet or of a run; NAME=PATH names it.

    Raises:
        ConfigError, ValueError: there is none, or its files do not fit; one line.
    """
    read_base(config.base)
    name, spec = _named(spec)
    if spec == TEACHER:
        return replace(teacher(config, config.steps), name=name or TEACHER)
    path = Path(spec).expanduser()
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise ConfigError(
                f"{path} does not exist: MODEL is a LoRA file, or a folder of a run, a UNet or a pipeline"
            )
        return _lora(name or path.stem, path.resolve(), config)
    if (path / "config.yaml").is_file():
        return _run(name or path.name, path.resolve(), config)
    if (path / "model_index.json").is_file():
        return _pipeline(name or path.name, path.resolve(), config)
    if (path / UNET_FILE).is_file() and (path / "config.json").is_file():
        said = read_sampling(path)
        parts = {n: (str(path.resolve()), _how(config, said, n)) for n in config.steps}
        return Subject(name or path.name, "unet", str(Path(config.base).resolve()), parts)
    raise ConfigError(
        f"{path} is no model: name a LoRA (.safetensors), a run's folder (config.yaml), a UNet's folder ({UNET_FILE}), a "
        "pipeline's folder (model_index.json), or teacher"
    )


def _pipeline(name: str, path: Path, config: EvaluateConfig) -> Subject:
    """A whole pipeline, sampled as the command line says; the base's own folder is the teacher, guided."""
    read_base(path)
    if path == Path(config.base).resolve():
        return replace(teacher(config, config.steps), name=name)
    parts = {n: ("", _how(config, None, n)) for n in config.steps}
    if config.scheduler == "auto" and config.guidance > 1:
        parts = {n: ("", replace(how, scheduler="edges")) for n, (_, how) in parts.items()}
    return Subject(name, "base", str(path), parts)


def find_baseline(config: EvaluateConfig) -> Subject:
    """`config.baseline`; the word teacher is the base at its own number of steps, under a name that says so, or its own.

    Raises: as `find_subject`.
    """
    name, spec = _named(config.baseline)
    if spec == TEACHER:
        return replace(teacher(config, [config.teacher_steps]), name=name or f"{TEACHER} at {config.teacher_steps}")
    return find_subject(config.baseline, config)


def _named(spec: str) -> tuple[str, str]:
    match = re.match(r"^([\w. +-]+)=(.+)$", spec)
    return (match[1], match[2]) if match else ("", spec)


def _how(config: EvaluateConfig, metadata: LoRAMetadata | UNetSampling | None, steps: int) -> How:
    """What the command line says, else what the LoRA or the UNet's folder says of itself, else TCD."""
    scheduler, timesteps = config.scheduler, None
    own = SAMPLERS.get(metadata.scheduler, "tcd") if metadata else "tcd"
    if scheduler == "auto":
        scheduler = own  # type: ignore[assignment]
    if metadata and metadata.timesteps and scheduler == own:
        timesteps = _some(metadata.timesteps, steps)
    eta = config.eta if config.eta is not None else metadata.eta if metadata and scheduler == "tcd" else 0.0
    limit = TCD_GRID if scheduler in ("tcd", "lcm") else 1000
    if not 1 <= steps <= limit:
        raise ConfigError(f"--steps {steps} with --scheduler {scheduler}: each must be within 1..{limit}")
    if eta and scheduler in ("ddim", "lcm") and config.eta is not None:
        raise ConfigError(f"--eta {eta:g} with --scheduler {scheduler}, which has no such thing: use tcd or edges")
    return How(
        scheduler, eta if scheduler in ("tcd", "edges") else 0.0, _guidance(config, metadata), timesteps=timesteps
    )


def _guidance(config: EvaluateConfig, metadata: LoRAMetadata | UNetSampling | None) -> float:
    """The few-step models' scale; what was made to be guided has the teacher's where the command line names none."""
    kept = metadata is not None and metadata.extra.get(GUIDANCE) == KEPT
    return config.teacher_guidance if kept and config.guidance == 1 else config.guidance


def _some(timesteps: Sequence[int], steps: int) -> tuple[int, ...] | None:
    """`steps` of them, evenly chosen, the first included; None where there are too few."""
    if steps > len(timesteps):
        return None
    return tuple(timesteps[i * len(timesteps) // steps] for i in range(steps))


def _lora(name: str, path: Path, config: EvaluateConfig) -> Subject:
    metadata = read_lora(path)[1]
    parts = {n: (str(path), _how(config, metadata, n)) for n in config.steps}
    notes = metadata.to_strings() if metadata else {}
    return Subject(name, "lora", str(Path(config.base).resolve()), parts, notes)


def read_run(folder: Path) -> AnyConfig:
    """The configuration that a run left in its folder.

    Raises:
        ConfigError: it is of no kind that is known.
    """
    values: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    kind = min(KINDS.values(), key=lambda one: len(one.config.model_fields.keys() ^ values.keys()))
    try:
        return kind.config.model_validate(values)
    except ValueError as error:
        raise ConfigError(f"{folder}/config.yaml cannot be read: {' '.join(str(error).split())[:200]}") from None


def _run(name: str, folder: Path, config: EvaluateConfig) -> Subject:
    run = read_run(folder)
    return run_subject(name, folder, run, config)


def run_subject(name: str, folder: Path, run: AnyConfig, config: EvaluateConfig) -> Subject:
    """A run's products, each number of steps by the LoRA and the sampler that the recipe has for it; an eta or a guidance
    that the command line names goes before the recipe's.

    Raises:
        ConfigError: the run has not left its LoRA yet.
        ValueError: the LoRA cannot be read; one line.
    """
    kind, parts = KINDS[kind_of(run)], {}
    for steps in config.steps:
        weights = folder / kind.product(run, steps)
        if not weights.is_file():
            raise ConfigError(f"{weights} does not exist: the run has not finished, or trained the full UNet")
        metadata = read_metadata(weights)
        if config.scheduler == "auto":
            how = replace(run_how(kind.samplings(run), steps), guidance=_guidance(config, metadata))
        else:
            how = _how(config, metadata, steps)
        if config.eta is not None and how.scheduler == "edges":
            if config.eta and how.windows is not None:
                raise ConfigError(
                    f"--eta {config.eta:g} with {folder}: lines (PeRFlow) are followed without noise; leave it out"
                )
            how = replace(how, eta=config.eta)
        parts[steps] = (str(weights), how)
    return Subject(name, "lora", str(Path(config.base).resolve()), parts, {"recipe": run.run.name})


def run_how(samplings: Sequence[Sampling], steps: int) -> How:
    """As the recipe samples at `steps`; where it has no such number, on the training edges with its greatest eta."""
    found = next((s for s in samplings if s.steps == steps), None)
    if found is None:
        return How("edges", max((s.eta for s in samplings), default=0.0))
    return How("edges", found.eta, times=found.times, windows=found.windows)
