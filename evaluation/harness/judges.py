"""Who judges pictures: reward models, a CLIP's image features, a detector. Each with a card, each in a scoring actor.

Shapes: pictures float (B, 3, H, W) in [0, 1] -> values float32 (B,), features (B, D), found objects (B, M, 2) of label
and score, padded with -1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import torch
from torch import Tensor

from hypersd_ray.config.base import ConfigError
from hypersd_ray.config.evaluate import EvaluateConfig, JudgesConfig
from hypersd_ray.config.rewards import PerceptionConfig, RewardConfig, RewardName
from hypersd_ray.embedded import paths
from hypersd_ray.models.hashing import sha256_of
from hypersd_ray.models.perception.registry import load_perception
from hypersd_ray.models.rewards.aesthetic import AestheticPredictor
from hypersd_ray.models.rewards.clip import CLIPScore, HPSv2, PickScore
from hypersd_ray.models.rewards.image_reward import ImageReward
from hypersd_ray.models.rewards.protocol import RewardModel
from hypersd_ray.models.rewards.registry import ARCHITECTURES, load_reward

AS_TENSORS = ", on tensors (within a grey level of PIL's)"
"""How all judges resize: see hypersd_ray/models/rewards/preprocess.py."""
FEATURES, OBJECTS = "clip_features", "objects"
MOST_OBJECTS = 20
"""Found objects kept of a picture, the surest."""
Judge = Callable[[Tensor, Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class MetricCard:
    """What stands behind a number.

    Attributes:
        name: its column.
        title: in words.
        model: which network, and its file or folder.
        sha256: of its weights.
        preprocessing: what is done to a picture before.
        scale: what the number is, and which way is better.
        better: "higher" or "lower".
        note: what to beware of.
        cases: what a single picture is ranked by, where that is not the number itself.
        published: the judge is a reward model of the sizes that its authors published.
    """

    name: str
    title: str
    model: str
    sha256: str
    preprocessing: str
    scale: str
    better: Literal["higher", "lower"] = "higher"
    note: str = ""
    cases: str = ""
    published: bool = False


@dataclass(frozen=True)
class JudgeSpec:
    """A judge before it is loaded: its kind, its configuration as JSON, and a name for its files (with its hash). "pairs" is of
    two pictures of a prompt: lpips.py."""

    name: str
    kind: Literal["reward", "features", "objects", "pairs"]
    config: str
    sha256: str

    @property
    def file(self) -> str:
        """Of its values: other weights are another judge."""
        digest = hashlib.sha256(f"{self.kind}{self.sha256}".encode()).hexdigest()[:8]
        return f"{self.name}-{digest}"


TITLES: dict[RewardName, tuple[str, str, type[RewardModel]]] = {
    "clip_score": ("CLIP score", "100 x cosine of picture and prompt", CLIPScore),
    "aesthetic_v1": ("aesthetic v1", "about 1 (poor) to 10 (fine)", AestheticPredictor),
    "aesthetic_v2": ("aesthetic", "about 1 (poor) to 10 (fine)", AestheticPredictor),
    "image_reward": ("ImageReward", "standardised: 0 is the mean of the authors' pictures, 1 a standard deviation", ImageReward),
    "pick_score": ("PickScore", "cosine, as the paper has it", PickScore),
    "hps_v21": ("HPS v2.1", "100 x cosine", HPSv2),
}  # fmt: skip
"""reward -> title, scale, class."""


def embedded_judges() -> JudgesConfig:
    """The embedded world's own."""
    return JudgesConfig(
        clip_score=str(paths.EVALUATORS / "clip"),
        clip_large=str(paths.EVALUATORS / "clip_large"),
        aesthetic_v2=str(paths.EVALUATORS / "aesthetic.safetensors"),
        image_reward=str(paths.EVALUATORS / "image_reward"),
        hps_v21=str(paths.EVALUATORS / "hps"),
        solo=str(paths.EVALUATORS / "solo"),
        annotations=str(paths.DATA / "instances_val.json"),
        captions=str(paths.DATA / "captions_val.json"),
    )


def chosen_judges(config: EvaluateConfig) -> JudgesConfig:
    """Those that are named; where none is, the embedded ones for the embedded model and for its prompts."""
    ours = config.prompts == "embedded" or Path(config.base).resolve() == paths.TEACHER.resolve()
    if config.judges.is_empty and ours:
        return embedded_judges()
    return config.judges


def judge_specs(judges: JudgesConfig) -> list[JudgeSpec]:
    """A spec for each judge that has weights, its paths absolute: actors work in folders of their own.

    Raises:
        ConfigError: a file is missing, or a judge lacks what it needs.
    """
    named = {
        field: str(Path(path).expanduser().resolve()) if path else "" for field, path in judges.model_dump().items()
    }
    judges, specs = JudgesConfig(**named), []
    towers = {"aesthetic_v1": judges.clip_large, "aesthetic_v2": judges.clip_large}
    for name in TITLES:
        checkpoint = getattr(judges, name)
        if not checkpoint:
            continue
        if name in towers and not judges.clip_large:
            raise ConfigError(f"--judges.{_flag(name)} needs --judges.clip-large: the CLIP ViT-L/14 below it")
        reward = RewardConfig(
            name=name, checkpoint=checkpoint, tower=towers.get(name, ""),
            tokenizer=judges.image_reward_tokenizer if name == "image_reward" else "",
        )  # fmt: skip
        files = [checkpoint, *([judges.clip_large] if name in towers else [])]
        specs.append(JudgeSpec(name, "reward", reward.model_dump_json(), _hash(name, files)))
    if judges.clip_score:
        tower = RewardConfig(name="clip_score", checkpoint=judges.clip_score)
        specs.append(JudgeSpec(FEATURES, "features", tower.model_dump_json(), _hash("clip_score", [judges.clip_score])))
    if judges.lpips:
        about = json.dumps({"checkpoint": judges.lpips})
        specs.append(JudgeSpec("lpips", "pairs", about, _hash("lpips", [judges.lpips])))
    if judges.solo:
        for field in ("annotations", "captions"):
            if not getattr(judges, field):
                raise ConfigError(f"--judges.solo needs --judges.{field}: which objects a prompt names")
            _hash(field, [getattr(judges, field)])
        solo = PerceptionConfig(checkpoint=judges.solo)
        specs.append(JudgeSpec(OBJECTS, "objects", solo.model_dump_json(), _hash("solo", [judges.solo])))
    return specs


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _hash(name: str, files: Sequence[str]) -> str:
    for file in files:
        if not Path(file).exists():
            raise ConfigError(f"--judges.{_flag(name)}: {file} does not exist")
    return (
        hashlib.sha256("".join(hash_of(file) for file in files).encode()).hexdigest()
        if len(files) > 1
        else hash_of(files[0])
    )


@lru_cache(maxsize=64)
def hash_of(path: str) -> str:
    """sha256 of a file, or of all files of a folder."""
    if Path(path).is_file():
        return sha256_of(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(path).rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path)} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def load_judge(spec: JudgeSpec, device: str = "cpu", dtype: str = "float32") -> Judge:
    """The judge itself. Raises ValueError: its weights do not fit."""
    number = getattr(torch, dtype)
    if spec.kind == "objects":
        return Detector(PerceptionConfig.model_validate_json(spec.config), device, number)
    reward = load_reward(RewardConfig.model_validate_json(spec.config), device, number)
    if spec.kind == "features":
        tower: Any = reward.tower
        return lambda images, prompts: tower.image_embedding(images.to(device)).cpu().numpy()
    return lambda images, prompts: reward(images.to(device), prompts).float().cpu().numpy()


class Detector:
    """SOLO's found objects."""

    def __init__(self, config: PerceptionConfig, device: str, dtype: torch.dtype):
        self.model, self.device = load_perception(config, device, dtype), device

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> np.ndarray:
        found = np.full((len(images), MOST_OBJECTS, 2), -1, np.float32)
        for i, instances in enumerate(self.model.predict(images.to(self.device))):
            assert instances.scores is not None, "found objects have scores"
            best = instances.scores.argsort(descending=True)[:MOST_OBJECTS]
            found[i, : len(best), 0] = instances.labels[best].cpu()
            found[i, : len(best), 1] = instances.scores[best].float().cpu()
        return found


def reward_card(spec: JudgeSpec) -> MetricCard:
    """Of a reward model's column."""
    config = RewardConfig.model_validate_json(spec.config)
    name = config.name
    title, scale, model = TITLES[name]
    published = is_published(config)
    architecture = config.architecture or ARCHITECTURES.get(name, "")
    network = (architecture or model.__name__) if published else "a small network of the class"
    return MetricCard(
        spec.name, title, f"{model.__name__} ({network}), {Path(config.checkpoint).name}", spec.sha256,
        f"{model.convention}{AS_TENSORS}", scale, published=published,
    )  # fmt: skip


def is_published(config: RewardConfig) -> bool:
    """Whether a judge's network has the sizes of the published one: a file is loaded into nothing else, a folder says."""
    folder = Path(config.tower or config.checkpoint)
    if not folder.is_dir():
        return not config.architecture or config.architecture == ARCHITECTURES.get(config.name)
    try:
        if config.name == "pick_score":  # a CLIP ViT-H/14
            return json.loads((folder / "config.json").read_text())["projection_dim"] == 1024
        ours = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    except (OSError, ValueError, KeyError):  # ImageReward's folders are the embedded world's alone
        return False
    theirs = open_clip.get_model_config(ARCHITECTURES[config.name])
    vision = ("width", "layers", "patch_size")
    same = ours.get("embed_dim") == theirs["embed_dim"] and ours.get("quick_gelu", False) == theirs.get(
        "quick_gelu", False
    )
    return same and all(ours["vision_cfg"].get(n) == theirs["vision_cfg"].get(n) for n in vision)


def card_rows(cards: Sequence[MetricCard]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(card) for card in cards]


def try_judge(judge: Judge, images: Tensor, prompts: Sequence[str], batch: int) -> tuple[np.ndarray, list[str]]:
    """Values of all pictures, in batches; a picture on which the judge fails has NaN, and why is said.

    Raises:
        RuntimeError: it fails on every one of several pictures: it is the judge that is broken.
    """
    parts: list[np.ndarray | None] = []
    failures: list[str] = []
    for first in range(0, len(images), batch):
        part, told = images[first : first + batch], list(prompts[first : first + batch])
        try:
            parts += list(_call(judge, part, told))
        except Exception:
            for i in range(len(part)):
                try:
                    parts.append(_call(judge, part[i : i + 1], told[i : i + 1])[0])
                except Exception as error:
                    parts.append(None)
                    failures.append(f"{told[i]!r:.80}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
    found = next((p for p in parts if p is not None), None)
    if found is None:
        if len(parts) > 1:
            raise RuntimeError(f"fails on all of {len(parts)} pictures, first {failures[0]}")
        found = np.zeros((), np.float32)
    return np.stack([np.full_like(found, np.nan) if p is None else p for p in parts]), failures


def _call(judge: Judge, images: Tensor, prompts: list[str]) -> np.ndarray:
    with torch.no_grad():
        values = np.asarray(judge(images, prompts), np.float32)
    bad = ~np.isfinite(values.reshape(len(values), -1)).all(1)
    if bad.any() and len(values) > 1:
        raise ValueError("a score is not finite")  # then one at a time
    if bad.any():
        raise ValueError("its score is not finite")
    return values


def describe(specs: Sequence[JudgeSpec]) -> str:
    """For a log line."""
    return ", ".join(spec.name for spec in specs) or "none"


def specs_to_json(specs: Sequence[JudgeSpec]) -> str:
    """To travel to actors."""
    return json.dumps([asdict(spec) for spec in specs])


def specs_from_json(text: str) -> list[JudgeSpec]:
    """The inverse."""
    return [JudgeSpec(**values) for values in json.loads(text)]
