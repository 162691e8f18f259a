"""CLIP score, HPS, PickScore and the aesthetic heads: values against the reference formulas, layouts, independence."""

import copy
import json

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from hypersd_ray.config.rewards import RewardConfig
from hypersd_ray.models.rewards.aesthetic import AestheticPredictor, HeadV2, head_v1, load_head
from hypersd_ray.models.rewards.clip import (
    WEIGHTS,
    CLIPScore,
    HPSv2,
    PickScore,
    load_pick_score,
    load_tower,
    openai_tokenizer,
)
from hypersd_ray.models.rewards.registry import load_reward

PROMPTS = ["a noto penguin on a yellow background", "a twemoji red apple on a sky background", "", "a noto pizza"]


def assert_independent(model, images, prompts):
    """Score and gradient of a sample are the same alone and in a batch."""
    x = images.clone().requires_grad_(True)
    scores = model(x, prompts)
    (together,) = torch.autograd.grad(scores.sum(), x)
    assert torch.isfinite(scores).all() and scores.dtype == torch.float32
    for i in range(len(images)):
        one = images[i : i + 1].clone().requires_grad_(True)
        alone = model(one, prompts[i : i + 1])
        (gradient,) = torch.autograd.grad(alone.sum(), one)
        torch.testing.assert_close(alone[0], scores[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradient[0], together[i], rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
        assert gradient.abs().sum() > 0


def test_clip_score_is_100_cosine(clip_folder, pictures):
    model = CLIPScore(load_tower("", clip_folder))
    tokens = model.tower.tokenize(PROMPTS)
    with torch.no_grad():
        image = model.tower.clip.encode_image(model.tower.preprocess(pictures[:4]), normalize=True)
        text = model.tower.clip.encode_text(tokens, normalize=True)
    torch.testing.assert_close(model(pictures[:4], PROMPTS), 100 * (image * text).sum(-1))
    assert model(pictures[:4], PROMPTS).std() > 0
    assert_independent(model, pictures[:4], PROMPTS)


def test_hps_sees_the_whole_picture(clip_folder, pictures):
    """Its padding keeps the sides that CLIP's crop loses."""
    wide = torch.nn.functional.interpolate(pictures[:2], size=(32, 64))
    other = wide.clone()
    other[..., :8] = 1 - other[..., :8]
    crop, pad = CLIPScore(load_tower("", clip_folder)), HPSv2(load_tower("", clip_folder, fit="pad"))
    assert torch.equal(crop(wide, PROMPTS[:2]), crop(other, PROMPTS[:2]))
    assert not torch.equal(pad(wide, PROMPTS[:2]), pad(other, PROMPTS[:2]))


def test_the_folder_tokenizer_pools_at_the_end_token(clip_folder):
    """Ids after the end token are 0 and the end token is the largest, as open_clip's pooling wants."""
    ids = load_tower("", clip_folder).tokenize(PROMPTS)
    end = ids.max()
    assert ((ids == end).sum(-1) == 1).all()
    assert ids[2, 2:].sum() == 0  # the empty prompt: start, end


def test_openais_tokenizer_needs_no_hub():
    """Ids of `a photo of a cat` in CLIP's published vocabulary."""
    ids = openai_tokenizer()(["a photo of a cat"])[0]
    assert ids[:7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_aesthetic_v1_is_a_linear_of_the_unit_embedding(clip_folder, pictures, tmp_path):
    torch.manual_seed(0)
    head = head_v1(24)
    torch.save(head.state_dict(), tmp_path / "sa_0_4_vit_l_14_linear.pth")
    config = RewardConfig(
        name="aesthetic_v1", checkpoint=str(tmp_path / "sa_0_4_vit_l_14_linear.pth"), tower=str(clip_folder)
    )
    model = load_reward(config)
    assert isinstance(model, AestheticPredictor)
    with torch.no_grad():
        embedding = model.tower.clip.encode_image(model.tower.preprocess(pictures))
        expected = (embedding / embedding.norm(dim=-1, keepdim=True)) @ head.weight[0] + head.bias
    torch.testing.assert_close(model(pictures, [""] * 8), expected)
    assert_independent(model, pictures[:3], PROMPTS[:3])


def test_published_head_layouts():
    """`sa_0_4_vit_l_14_linear.pth` and `sac+logos+ava1-l14-linearMSE.pth`."""
    with torch.device("meta"):
        assert {k: tuple(v.shape) for k, v in head_v1().state_dict().items()} == {"weight": (1, 768), "bias": (1,)}
        v2 = {k: tuple(v.shape) for k, v in HeadV2().state_dict().items()}
    assert v2 == {
        "layers.0.weight": (1024, 768), "layers.0.bias": (1024,), "layers.2.weight": (128, 1024), "layers.2.bias": (128,),
        "layers.4.weight": (64, 128), "layers.4.bias": (64,), "layers.6.weight": (16, 64), "layers.6.bias": (16,),
        "layers.7.weight": (1, 16), "layers.7.bias": (1,),
    }  # fmt: skip


def test_head_v2_has_no_activations(tmp_path):
    """So in evaluation it is one affine map."""
    torch.manual_seed(0)
    save_file(HeadV2(24, (32, 16, 8, 4)).state_dict(), tmp_path / "head.safetensors")
    head = load_head(tmp_path / "head.safetensors", 2, 24)
    x, y = torch.randn(2, 5, 24)
    torch.testing.assert_close(head(0.3 * x + 0.7 * y), 0.3 * head(x) + 0.7 * head(y), rtol=1e-4, atol=1e-5)


def test_an_unreadable_checkpoint_says_which_names(clip_folder, tmp_path):
    broken = tmp_path / "clip"
    broken.mkdir()
    for file in clip_folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / WEIGHTS)
    tensors["surplus"] = tensors.pop("ln_final.weight")
    save_file(tensors, broken / WEIGHTS)
    with pytest.raises(
        ValueError, match=r"open_clip_model.safetensors .* 1 missing \(ln_final.weight\), 1 unexpected \(surplus\)"
    ):
        load_tower("", broken)
    (broken / WEIGHTS).write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"open_clip_model\.safetensors cannot be read"):
        load_tower("", broken)


class Reduced:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "code": Reduced()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth cannot be read .* weights_only=True"):
        load_head(tmp_path / "bad.pth", 1, 24)
    assert "unpickled" not in capsys.readouterr().out


def small_pick_config() -> CLIPConfig:
    return CLIPConfig(
        projection_dim=24,
        text_config=dict(vocab_size=49408, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                         projection_dim=24, hidden_act="gelu", bos_token_id=49406, eos_token_id=49407),
        vision_config=dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                           projection_dim=24, image_size=32, patch_size=8, hidden_act="gelu"),
    )  # fmt: skip


def test_pick_score_from_its_folder(pictures, tmp_path):
    torch.manual_seed(0)
    clip = CLIPModel(small_pick_config()).eval()
    clip.save_pretrained(tmp_path)
    model = load_pick_score(tmp_path)
    assert isinstance(model, PickScore)
    with torch.no_grad():
        # transformers' own similarity: exp(logit_scale) * cosine of every pair
        both = clip(input_ids=openai_tokenizer()(PROMPTS), pixel_values=model.preprocess(pictures[:4])).logits_per_image
    torch.testing.assert_close(model.logits(pictures[:4], PROMPTS), both.diagonal(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        model(pictures[:4], PROMPTS), both.diagonal() / clip.logit_scale.exp(), rtol=1e-4, atol=1e-5
    )
    assert_independent(model, pictures[:3], PROMPTS[:3])


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("ViT-B-32-quickgelu", 12 + 12), ("ViT-L-14-quickgelu", 24 + 12), ("ViT-H-14", 32 + 24)],
)
def test_published_towers_exist_in_open_clip(name, blocks):
    config = copy.deepcopy(open_clip.get_model_config(name))
    with torch.device("meta"):
        clip = open_clip.CLIP(**config)
    names = clip.state_dict()
    # 12 tensors a block; 8 around the vision's, 6 around the text's
    assert len(names) == 12 * blocks + 8 + 6
    assert {"visual.proj", "text_projection", "logit_scale", "token_embedding.weight"} <= names.keys()


def test_prompts_and_images_must_pair(clip_folder, pictures):
    with pytest.raises(ValueError, match="8 images and 4 prompts"):
        CLIPScore(load_tower("", clip_folder))(pictures, PROMPTS)


def test_unknown_architecture_and_folder(tmp_path):
    with pytest.raises(ValueError, match="architecture='ViT-Q' is not one of"):
        load_tower("ViT-Q", tmp_path / "x.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({})[:-1])
    with pytest.raises(ValueError, match=r"open_clip_config\.json cannot be read"):
        load_tower("", tmp_path)
