"""ImageReward against timm's ViT and transformers' BERT, which hold weights under the published names."""

import pytest
import timm
import torch
from transformers import BertConfig, BertModel

from hypersd_ray.models.rewards.aesthetic import HeadV2
from hypersd_ray.models.rewards.image_reward import (
    MEAN,
    STD,
    ImageReward,
    from_published,
    load_image_reward,
    make_tokenizer,
    save_image_reward,
    text_config,
    vision_config,
)
from hypersd_ray.models.rewards.weights import load_weights
from tests.rewards.test_clip_rewards import assert_independent

PROMPTS = ["a red cat", "a cat and a blue dog", "the dog"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "and", "the", "red", "blue", "cat", "dog", "##s"]
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return path


@pytest.fixture(scope="module")
def published():
    """The authors' parts at a small size: timm's ViT, a BERT with cross attention, and their tensors by published name."""
    torch.manual_seed(0)
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2, num_classes=0, global_pool=""
    ).eval()
    bert = BertModel(
        BertConfig(
            vocab_size=len(WORDS) + 2, is_decoder=True, add_cross_attention=True, max_position_embeddings=64, **SMALL
        ),
        add_pooling_layer=False,
    ).eval()
    # Decoders of today are causal; BLIP's encoder is not.
    bert.config.is_decoder = False
    head = HeadV2(32).eval()
    for module in (vit, bert, head):
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.2)
    # BLIP's text has no segments
    torch.nn.init.zeros_(bert.embeddings.token_type_embeddings.weight)
    tensors = {f"blip.visual_encoder.{k}": v for k, v in vit.state_dict().items()}
    tensors |= {f"blip.text_encoder.{k}": v for k, v in bert.state_dict().items() if "token_type" not in k}
    tensors |= {f"mlp.{k}": v for k, v in head.state_dict().items()}
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    tensors["blip.vision_proj.weight"] = torch.zeros(4, 32)
    return vit, bert, head, tensors


@pytest.fixture(scope="module")
def model(published, vocabulary):
    small = ImageReward(
        vision_config(image_size=32, patch_size=8, **SMALL),
        text_config(vocab_size=len(WORDS) + 2, encoder_hidden_size=32, max_position_embeddings=64, **SMALL),
        make_tokenizer(vocabulary),
    )
    load_weights(small, from_published(published[3]), "ImageReward.pt", ignore=("blip.vision_proj.",))
    return small.eval().requires_grad_(False)


def test_scores_are_the_references(published, model, pictures):
    """Of one picture with two prompts, and of another."""
    vit, bert, head, _ = published
    shown = pictures[[0, 0, 1]]
    told = model.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    with torch.no_grad():
        patches = vit.forward_features(model.preprocess(shown))
        assert patches.shape == (3, 17, 32)
        out = bert(
            input_ids=told.input_ids,
            attention_mask=told.attention_mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(3, 17),
        )
        expected = (head(out.last_hidden_state[:, 0])[:, 0] - MEAN) / STD
    scores = model(shown, PROMPTS)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert torch.pdist(scores[:, None]).min() > 0.01


def test_samples_do_not_interact(model, pictures):
    assert_independent(model, pictures[:3], PROMPTS)


def test_published_names_and_count():
    """ViT-L/16 and BERT-base with cross attention: 446,206,689 parameters in 620 tensors, with the head's ten."""
    with torch.device("meta"):
        full = ImageReward(vision_config(), text_config(), None)
        vit = timm.create_model("vit_large_patch16_224", num_classes=0)
        bert = BertModel(BertConfig(vocab_size=30524, is_decoder=True, add_cross_attention=True), False)
    own = {k: tuple(v.shape) for k, v in full.state_dict().items()}
    assert len(own) == 620 and sum(p.numel() for p in full.parameters()) == 446_206_689
    tensors = {f"blip.visual_encoder.{k}": v for k, v in vit.state_dict().items()}
    mapped = {k: tuple(v.shape) for k, v in from_published(tensors).items()}
    assert mapped == {k: v for k, v in own.items() if k.startswith("vision.")}
    text = {k.removeprefix("text.") for k in own if k.startswith("text.")}
    assert text == bert.state_dict().keys() - {"embeddings.token_type_embeddings.weight"}
    assert own["text.encoder.layer.3.crossattention.self.key.weight"] == (768, 1024)


def test_a_wrong_checkpoint_names_what_is_missing(published, model):
    tensors = dict(published[3])
    tensors["mlp.layers.8.weight"] = tensors.pop("mlp.layers.7.weight")
    with pytest.raises(ValueError, match=r"x.pt .* 1 missing \(head.layers.7.weight\), 2 unexpected"):
        load_weights(model, from_published(tensors), "x.pt")


def test_a_folder_keeps_the_scores(model, pictures, tmp_path):
    save_image_reward(model, tmp_path)
    torch.testing.assert_close(load_image_reward(tmp_path)(pictures[:3], PROMPTS), model(pictures[:3], PROMPTS))


def test_bert_vocabulary_has_blips_two_tokens(vocabulary):
    tokenizer = make_tokenizer(vocabulary)
    assert len(tokenizer) == len(WORDS) + 2
    assert tokenizer("A red Cat")["input_ids"] == [2, 5, 8, 10, 3]
    with pytest.raises(ValueError, match=r"vocab\.txt"):
        make_tokenizer(vocabulary.parent / "nowhere")
