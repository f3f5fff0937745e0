"""The demo's text encoder: a small random Gemma that is never trained, and a tokenizer of the world's words."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

from ltxkern.pipeline.files.demo import demo_text_encoder, draw_weights
from ltxkern.pipeline.model.text import text_hidden_states, tokenize
from ltxkern.pipeline.run.request import DEFAULT_NEGATIVE_PROMPT
from tools.demo_model.configuration import TEXT_TOKENS
from tools.demo_model.prompts import READ_AS, base_forms, left_out, plurals, vocabulary

_PAD, _BOS, _EOS, _UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
_SEED = 16
DROPPED = 0.15


def tokenizer() -> Any:
    """One token a word, in small letters and without punctuation; other words are read as known ones, or as the unknown one."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase, Replace, Sequence
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = [_PAD, _BOS, _EOS, _UNKNOWN, *vocabulary()]
    made = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=_UNKNOWN))
    read = {rf"{plurals()}\b": "", rf"{base_forms()}\b": "s"}
    read |= {rf"\b(?:{'|'.join(others)})\b": word for word, others in READ_AS.items()}
    read |= {rf"\b{pattern}\b *": "" for pattern in left_out()}
    replaced = [Replace(Regex(pattern), word) for pattern, word in read.items()]
    # Commas stay until all is read: what stands behind one belongs to no word before it.
    plain = [Replace(Regex("[^a-z]*[,.;:!?][^a-z]*"), ", "), Replace(Regex("[^a-z,]+"), " ")]
    made.normalizer = Sequence([Lowercase(), *plain, *replaced, Replace(",", " ")])
    made.pre_tokenizer = WhitespaceSplit()
    made.post_processor = TemplateProcessing(single=f"{_BOS} $A", special_tokens=[(_BOS, words.index(_BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        unk_token=_UNKNOWN,
        model_max_length=TEXT_TOKENS,
        padding_side="left",
    )


def text_encoder() -> Any:
    """Gemma with random weights; the same in every run."""
    with torch.random.fork_rng(devices=[]):
        made = demo_text_encoder(len(tokenizer()))
    draw_weights("text_encoder", made, _SEED)
    return made


class Encoder:
    """Prompts to what the connectors take."""

    def __init__(self) -> None:
        self.tokenizer, self.model = tokenizer(), text_encoder()

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Hidden states (B, L, D, layers + 1) and mask (B, L)."""
        ids, mask = tokenize(self.tokenizer, prompts)
        return text_hidden_states(self.model, ids, mask), mask


def without_meaning(draws: Random) -> str:
    """A prompt that says nothing of a scene: the default negative one, none, or words that are not known."""
    kind = draws.random()
    if kind < 0.6:
        return DEFAULT_NEGATIVE_PROMPT
    return "" if kind < 0.8 else " ".join(["something"] * draws.randrange(1, TEXT_TOKENS))


def with_filler(prompt: str, draws: Random) -> str:
    """A prompt with some unknown words in it, as people write them."""
    words = prompt.split()
    for _ in range(draws.choice((0, 0, 0, 1, 2, 3))):
        words.insert(draws.randrange(len(words) + 1), "something")
    return " ".join(words)
