"""The embedded world's tokenizer and text encoder: real CLIP classes, small."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 24
"""Longest prompt in tokens (SD1.5: 77); the longest caption with two objects takes about 20."""


def train_tokenizer(captions: list[str], vocabulary: int = 2048) -> CLIPTokenizer:
    """CLIP's byte-level BPE, learnt on `captions`: any text can be tokenized, common words are one token."""
    bpe = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(alphabet) - 2,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    learnt = bpe.to_str()
    merges, words = _merges_and_words(learnt, alphabet)
    vocab = {word: i for i, word in enumerate([*words, START, END])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS, pad_token=END)


def _merges_and_words(learnt: str, alphabet: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """CLIP's vocabulary order: bytes, bytes that end a word, then one word a merge."""

    merges = [tuple(pair) for pair in json.loads(learnt)["model"]["merges"]]
    alphabet = sorted(alphabet)
    words = alphabet + [byte + "</w>" for byte in alphabet] + ["".join(pair) for pair in merges]
    return merges, list(dict.fromkeys(words))


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """SD1.5's text encoder, narrower: 0.5M parameters and a 96-wide last hidden state."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=96,
    )
    return CLIPTextModel(config)


def load_tokenizer(path: Path) -> CLIPTokenizer:
    """The tokenizer saved in `path`."""
    return CLIPTokenizer.from_pretrained(path)
