"""The feedback step on a tiny pipeline: gradients, parts of the loss, NaN, resuming, watching."""

import pytest
import torch

from hypersd_ray.config.base import CombinationError, RunError
from hypersd_ray.config.data import DataConfig
from hypersd_ray.config.feedback import FeedbackConfig, ReFLConfig, StructureConfig
from hypersd_ray.config.rewards import PerceptionConfig, RewardConfig
from hypersd_ray.config.run import OptimConfig, RunConfig
from hypersd_ray.config.tscd import LoRAConfig
from hypersd_ray.embedded import paths
from hypersd_ray.models.checkpoint import load_unet, read_base
from hypersd_ray.models.conditioning import Conditioning
from hypersd_ray.models.encoders import load_encoders
from hypersd_ray.models.export import save_diffusers_lora
from hypersd_ray.models.lora import Adapters
from hypersd_ray.models.lora_file import LoRAMetadata
from hypersd_ray.models.perception.coco import CocoAnnotations
from hypersd_ray.models.perception.protocol import Instances
from hypersd_ray.models.roles import STUDENT, TEACHER
from hypersd_ray.models.scoring import LocalBackend, RewardClient
from hypersd_ray.recipes.feedback import feedback_tiny
from hypersd_ray.trainer.kinds.feedback import read_annotations
from hypersd_ray.training.feedback import Feedback, build_roles
from hypersd_ray.training.pictures import decode
from hypersd_ray.training.tscd import Batch
from hypersd_ray.training.watch import HackingWatch
from tests.helpers.distil import InMemory, same, snapshot, student_parameters
from tests.helpers.pipelines import build_pipeline, randomize, tiny_unet

PROMPTS = ("a drawn panda", "a drawn bicycle", "a twemoji panda", "a red apple")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_pipeline("sd", tmp_path_factory.mktemp("pipelines") / "tiny-sd15")


@pytest.fixture(scope="module")
def tscd(tmp_path_factory):
    adapters = Adapters(tiny_unet("sd"), 2, 4.0)
    adapters.add("student", trainable=False)
    tensors = randomize(adapters, "student", seed=3, size=0.05)
    metadata = LoRAMetadata("tiny", "sd", 1, (1,), "TCDScheduler", 0.0, 2, 4.0)
    path = tmp_path_factory.mktemp("lora") / "tscd.safetensors"
    return save_diffusers_lora(tensors, path, metadata)


@pytest.fixture(scope="module")
def encoders(folder):
    return load_encoders(folder)


def make_config(folder, lora, **changes) -> FeedbackConfig:
    rewards = (
        RewardConfig(name="aesthetic_v2", checkpoint="x", alpha=2.0),
        RewardConfig(name="clip_score", checkpoint="x", role="watch"),
    )
    return FeedbackConfig(
        **dict(
            teacher=str(folder), tscd=str(lora), data=DataConfig(shards="x.tar"), steps=8, rewards=rewards,
            structure=StructureConfig(model=PerceptionConfig(checkpoint="x")), lora=LoRAConfig(rank=2),
            optim=OptimConfig(lr=1e-2, batch=4), run=RunConfig(seed=1), decode_batch=2,
        )
        | changes
    )  # fmt: skip


def brightness(images, told):
    return images.mean((1, 2, 3)) * 4 - 2


def darkness(images, told):
    return -images.mean((1, 2, 3))


class InstanceLike:
    """A perception loss of pictures: mean square difference inside the first mask from grey; remembers what it was told."""

    def __init__(self):
        self.told = []

    def __call__(self, images, told):
        self.told = list(told)
        return images.square().mean((1, 2, 3))


def make(config, encoders, annotations=None, **models):
    models = {"aesthetic_v2": brightness, "clip_score": darkness, "solo": InstanceLike()} | models
    client = RewardClient(LocalBackend(models))
    return Feedback(config, build_roles(config, "cpu"), encoders.vae, client, annotations), models


@pytest.fixture(scope="module")
def batch(encoders):
    g = torch.Generator().manual_seed(0)
    embeds = encoders.encode_prompts(list(PROMPTS)).prompt_embeds
    return Batch(torch.randn(4, 4, 16, 16, generator=g), Conditioning(embeds), PROMPTS, ("k0", "k1", "k2", "k3"))


def test_the_base_is_the_tscd_model(folder, tscd, batch):
    """A fresh feedback LoRA changes nothing; both are the base with the TSCD LoRA, not the base."""
    config = make_config(folder, tscd)
    roles = build_roles(config, "cpu")
    t = torch.full((4,), 500)
    with torch.no_grad():
        student = roles.predict(STUDENT, batch.x0, t, batch.cond).x0
        teacher = roles.predict(TEACHER, batch.x0, t, batch.cond).x0
        info = read_base(folder)
        bare = load_unet(info, torch.float32, "cpu")(batch.x0, t - 1, batch.cond.prompt_embeds).sample
    alpha, sigma = info.schedule.at(t)
    torch.testing.assert_close(student, teacher, rtol=1e-4, atol=1e-4)
    assert ((batch.x0 - sigma * bare) / alpha - student).abs().max() > 0.05


def test_the_decoders_gradient_is_that_without_checkpoints(encoders):
    z = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    a, b = z.clone().requires_grad_(True), z.clone().requires_grad_(True)
    (decode(encoders.vae, a, 2) ** 2).sum().backward()
    plain = ((encoders.vae.decode(b / encoders.vae.config.scaling_factor).sample + 1) / 2).clamp(0, 1)
    (plain**2).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    assert a.grad.abs().max() > 0


def test_the_reward_rises(folder, tscd, batch, encoders):
    """Eight steps of the aesthetic part alone make the pictures brighter, and the regulariser sees the change."""
    config = make_config(folder, tscd, structure=StructureConfig(weight=0), drift=1e-4)
    feedback, _ = make(config, encoders)
    history = [feedback.step(batch) for _ in range(8)]
    first, last = (
        float(torch.stack([m["reward/aesthetic_v2"] for m in part]).mean()) for part in (history[:3], history[-3:])
    )
    assert last > first + 0.05
    assert history[0]["drift"] < 1e-6 < history[-1]["drift"]
    assert feedback.progress.step == 8 and feedback.progress.skipped == 0
    assert {"watch/clip_score", "saturation", "diversity", "grad_norm", "loss"} <= history[-1].keys()
    feedback.next_stage()
    assert feedback.finished


def test_annotations_or_the_real_picture(folder, tscd, batch, encoders):
    """Known pictures come with their objects, the others as themselves for the model to look at."""
    known = Instances(torch.ones(1, 128, 128, dtype=torch.bool), torch.tensor([0]))
    config = make_config(folder, tscd, refl=ReFLConfig(weight=0))
    feedback, models = make(config, encoders, lambda key: known if key == "k1" else None)
    metrics = feedback.step(batch)
    told = models["solo"].told
    assert told[1] is known
    with torch.no_grad():
        torch.testing.assert_close(told[2], decode(encoders.vae, batch.x0[2:3], 1)[0], rtol=1e-3, atol=1e-4)
    assert metrics["percep"] > 0 and "aes" not in metrics and metrics["annotated"] == 0.25


def test_a_picture_is_found_by_its_files_name_in_whatever_folder():
    config = feedback_tiny(str(paths.LORAS / "tscd-k1.safetensors"))
    find, name = read_annotations(config), next(iter(CocoAnnotations(config.structure.annotations).images))
    assert torch.equal(find(f"train2017/{name}").masks, find(name).masks) and find(f"{name}/other") is None


def test_annotations_of_other_pictures_end_the_run(folder, tscd, batch, encoders, monkeypatch):
    monkeypatch.setattr("hypersd_ray.training.feedback.ANNOTATED_WITHIN", 8)
    structure = StructureConfig(model=PerceptionConfig(checkpoint="x"), annotations="instances.json")
    config = make_config(folder, tscd, refl=ReFLConfig(weight=0), structure=structure)
    feedback, _ = make(config, encoders, lambda key: None)
    assert feedback.step(batch)["annotated"] == 0
    with pytest.raises(
        RunError, match=r"annotations=instances\.json has none of the first 8 pictures, .* 'k3'.*set str"
    ):
        feedback.step(batch)
    known = Instances(torch.ones(1, 128, 128, dtype=torch.bool), torch.tensor([0]))
    feedback, _ = make(config, encoders, lambda key: known if key == "k1" else None)
    assert [float(feedback.step(batch)["annotated"]) for _ in range(3)] == [0.25] * 3


def test_both_parts_add_up(folder, tscd, batch, encoders):
    """Eq. 17: the gradient of both is the sum of each one's."""

    def gradients(**changes):
        feedback, _ = make(make_config(folder, tscd, drift=0.0, **changes), encoders)
        # B is zero at the start, so that A would have no gradient at all
        randomize(feedback.roles.adapters, STUDENT, seed=5, size=0.05)
        generator = torch.Generator().manual_seed(0)
        state = generator.get_state()
        feedback._backward(batch, generator, 1)
        assert not torch.equal(generator.get_state(), state)
        return torch.cat([p.grad.flatten() for p in student_parameters(feedback.roles)])

    structure = StructureConfig(model=PerceptionConfig(checkpoint="x"), weight=3.0)
    both = gradients(structure=structure)
    aes = gradients(structure=StructureConfig(weight=0))
    assert aes.abs().max() > 0 and (both - aes).abs().max() > 0
    # the structure branch draws after the other, so its own gradient is what both leave over
    half = gradients(structure=structure.model_copy(update={"weight": 1.5}))
    torch.testing.assert_close(both - aes, 2 * (half - aes), rtol=1e-3, atol=1e-6)


def test_accumulation_is_the_same_batch(folder, tscd, batch, encoders):
    """Micro-batches draw their own noise, but each sees its own prompts once."""
    seen = []

    def remember(images, told):
        seen.append(tuple(told))
        return brightness(images, told)

    config = make_config(
        folder, tscd, optim=OptimConfig(lr=1e-3, batch=4, accumulation=2), structure=StructureConfig(weight=0)
    )
    feedback, _ = make(config, encoders, aesthetic_v2=remember)
    feedback.step(batch)
    assert seen == [PROMPTS[:2], PROMPTS[2:]]


def test_nan_of_one_sample_is_dropped_and_counted(folder, tscd, batch, encoders):
    def sometimes(images, told):
        return torch.where(torch.tensor([t == PROMPTS[2] for t in told]), torch.nan, brightness(images, told))

    config = make_config(folder, tscd, structure=StructureConfig(weight=0))
    feedback, _ = make(config, encoders, aesthetic_v2=sometimes)
    metrics = feedback.step(batch)
    assert metrics["dropped/aesthetic_v2"] == 1 and feedback.progress.skipped == 0
    assert torch.isfinite(metrics["loss"]) and torch.isfinite(metrics["grad_norm"])


def test_resuming_gives_the_same_weights(folder, tscd, batch, encoders):
    config = make_config(folder, tscd)
    straight, _ = make(config, encoders)
    for _ in range(3):
        straight.step(batch)
    first, _ = make(config, encoders)
    for _ in range(2):
        first.step(batch)
    kept = InMemory(first)
    second, _ = make(config, encoders)
    kept.into(second)
    second.step(batch)
    assert same(snapshot(second), snapshot(straight))
    assert second.notes() == straight.notes()


def test_hacking_is_noticed_once():
    watch = HackingWatch(patience=3, smoothing=0.0)
    rows = [watch.measure({"a": {1: i}, "d": {1: -i}}, {"b": {1: -i}, "c": {1: -2 * i}}) for i in range(6)]
    assert rows == [False, False, False, True, False, False] and watch.alarm and watch.risen == ("a",)
    assert not watch.measure({"a": {1: 7}}, {"b": {1: 0}, "c": {1: -20}}) and not watch.alarm  # one held-out rose


def test_hacking_is_sought_at_like_numbers_of_steps():
    """One step scores lower than four at all times: drawing the one or the other is no rise."""
    watch = HackingWatch(patience=1, smoothing=0.0)
    for _ in range(3):
        assert not watch.measure({"a": {4: 2.0}}, {"b": {4: 1.0}}) and watch.risen == ()
        assert not watch.measure({"a": {1: 1.0}}, {"b": {1: 2.0}}) and watch.risen == ()
    assert watch.measure({"a": {1: 1.0, 4: 2.1}}, {"b": {1: 1.9, 4: 1.0}}) and watch.risen == ("a",)


def test_the_watch_sees_all_pictures_of_a_step(folder, tscd, batch, encoders):
    """The mean over all micro-batches, and each with the number of steps that its pictures were made in."""
    seen = []

    def remember(images, told):
        seen.append(told)
        return torch.tensor([float(PROMPTS.index(t)) for t in told])

    config = make_config(
        folder, tscd, optim=OptimConfig(batch=4, accumulation=4), structure=StructureConfig(weight=0),
        refl=ReFLConfig(steps=(1, 2)),
    )  # fmt: skip
    feedback, _ = make(config, encoders, clip_score=remember)
    metrics = feedback.step(batch)
    assert seen == [[p] for p in PROMPTS] and float(metrics["watch/clip_score"]) == 1.5
    assert {key.rpartition(" in ")[2] for key in feedback.hacking.means} == {"1", "2"}


@pytest.mark.parametrize("alone", [False, True], ids=["rewards", "structure alone"])
def test_the_warning_is_told_once_and_names_the_knob(alone, folder, tscd, batch, encoders):
    parts = (
        {"refl": ReFLConfig(weight=0)}
        if alone
        else {"structure": StructureConfig(weight=0), "refl": ReFLConfig(steps=(1,))}
    )
    rewards = (
        *make_config(folder, tscd).rewards,
        RewardConfig(name="image_reward", checkpoint="x", alpha=2.0),
    )
    watch = {"every": 1, "patience": 1, "smoothing": 0.0}
    config = make_config(folder, tscd, watch=watch, rewards=rewards, **parts)
    levels, heldout = iter((3.0, 2.0, 1.0)), iter((3.0, 2.0, 1.0))
    models = {
        "solo": lambda images, told: images.mean((1, 2, 3)) * 0 + next(levels),  # a loss: what falls is learnt
        "aesthetic_v2": lambda images, told: images.mean((1, 2, 3)) * 0 - next(levels),
        "image_reward": lambda images, told: images.mean((1, 2, 3)) * 0,  # does not rise, and is not named
        "clip_score": lambda images, told: images.mean((1, 2, 3)) * 0 + next(heldout),
    }
    feedback, _ = make(config, encoders, **models)
    told: list[str] = []
    feedback.tell = told.append
    for _ in range(3):
        metrics = feedback.step(batch)
    what, knob = ("structure", "structure.weight") if alone else ("reward/aesthetic_v2", "the rewards' alpha")
    assert told == [
        f"step 1: {what} rises while watch/clip_score falls: likely reward hacking; raise drift=1, lower {knob}, or stop here"
    ]
    assert metrics["hacking"] == 1 and {"watch/clip_score", "saturation", "diversity"} <= metrics.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(refl=ReFLConfig(weight=0), structure=StructureConfig(weight=0)), "nothing to learn"),
        (dict(rewards=()), 'no reward has role "train"'),
        (dict(structure=StructureConfig()), "structure.model.checkpoint is empty"),
        (dict(tscd="nowhere.safetensors"), "tscd='nowhere.safetensors' does not exist"),
        (dict(optim=OptimConfig(batch=5, accumulation=2)), "the nearest accepted is"),
    ],
)
def test_settings_that_cannot_work(folder, tscd, changes, message):
    with pytest.raises(CombinationError, match=message):
        make_config(folder, tscd, **changes)


def test_step_ranges():
    assert ReFLConfig(steps=(4,), t_left=250, t_right=500).candidates(4) == [2, 3]
    assert ReFLConfig(steps=(1, 2), t_right=400).candidates(1) == [0], "it has no later step"
    assert ReFLConfig(steps=(1, 2), t_right=400).candidates(2) == [1]
    with pytest.raises(CombinationError, match=r"a sampler of 2 steps has none there \(its times are \[1000, 500\]\)"):
        ReFLConfig(steps=(4, 2), t_left=600, t_right=900)
    assert StructureConfig(start=500, denoise_to=200, jumps=3).times() == [500, 400, 300, 200]
    assert StructureConfig(start=200, denoise_to=200).times() == [200]
    with pytest.raises(CombinationError, match="lower it"):
        StructureConfig(start=100, denoise_to=200)
