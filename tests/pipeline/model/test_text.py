"""The text path: tokens, hidden states of every layer, connectors."""

from typing import Any

import pytest
import torch

from ltxkern.pipeline.files.demo import build_demo
from ltxkern.pipeline.model.components import Components
from ltxkern.pipeline.model.text import MAX_TEXT_TOKENS, encode_prompts, text_hidden_states, tokenize


@pytest.fixture(scope="module")
def demo() -> Components:
    return build_demo()


def encode(demo: Components, prompts: list[str], **options: Any) -> list:
    options = {"dtype": torch.float32} | options
    return encode_prompts(demo.tokenizer, demo.text_encoder, demo.connectors, prompts, **options)


def test_tokens_are_stripped_padded_left_and_start_with_bos(demo: Components) -> None:
    tokenizer = demo.tokenizer
    ids, mask = tokenize(tokenizer, ["  a cat\n", "", "x" * 5000])
    length = tokenizer.model_max_length
    assert ids.shape == mask.shape == (3, length)
    assert mask.sum(1).tolist() == [6, 1, length]
    assert ids[0, :-6].eq(tokenizer.pad_token_id).all()
    assert ids[0, -6] == ids[1, -1] == ids[2, 0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[0, -5:]) == "a cat"
    assert not ids.eq(tokenizer.eos_token_id).any()


def test_length_is_1024_where_the_tokenizer_allows_it(demo: Components) -> None:
    class Recorder:
        model_max_length = 10**30

        def __call__(self, prompts: list[str], **options: Any) -> dict[str, Any]:
            self.options = options
            return {"input_ids": None, "attention_mask": None}

    tokenizer = Recorder()
    tokenize(tokenizer, ["x"])
    assert tokenizer.options["max_length"] == MAX_TEXT_TOKENS == 1024
    assert tokenizer.options["padding_side"] == "left"


def test_prompts_must_be_strings(demo: Components) -> None:
    with pytest.raises(TypeError, match="prompts: expected strings, got NoneType"):
        tokenize(demo.tokenizer, [None])  # type: ignore[list-item]


@torch.no_grad()
def test_hidden_states_are_those_of_the_whole_model(demo: Components) -> None:
    ids, mask = tokenize(demo.tokenizer, ["a cat", "a much longer prompt"])
    calls = []
    handle = demo.text_encoder.lm_head.register_forward_hook(lambda *args: calls.append(args))
    hidden = text_hidden_states(demo.text_encoder, ids, mask)
    assert not calls, "logits over the vocabulary were computed"
    whole = demo.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert calls
    handle.remove()
    assert hidden.shape == (2, ids.shape[1], 32, 3) == (*whole[0].shape, len(whole))
    for layer, expected in enumerate(whole):
        assert torch.equal(hidden[..., layer], expected)
    text_model = demo.text_encoder.model.language_model
    assert torch.equal(hidden[..., 0], text_model.embed_tokens(ids))
    assert torch.equal(text_hidden_states(text_model, ids, mask), hidden)
    # The last one is after the final norm, so its RMS over the width is that of the norm's weight, near 1.
    rms = hidden[:, -1, :, -1].pow(2).mean(-1).sqrt()
    assert rms.sub(2).abs().max() < 0.5, "Gemma scales by 1 + weight, and the weights are drawn around 1"


def test_embeddings(demo: Components) -> None:
    first, second = encode(demo, ["a red door", "a blue door"])
    length = demo.tokenizer.model_max_length
    for name, width in (("video", 64), ("audio", 32)):
        one, other = getattr(first, name), getattr(second, name)
        assert one.shape == (1, length, width)
        assert one.dtype == torch.float32
        assert torch.isfinite(one).all()
        # The connector ends in a norm without weights.
        torch.testing.assert_close(one.pow(2).mean(-1), torch.ones(1, length), rtol=0, atol=1e-3)
        assert (one - other).std() > 0.05, "the prompt does not matter"


def test_a_prompt_does_not_depend_on_its_neighbours(demo: Components) -> None:
    alone = encode(demo, ["a red door"])[0]
    among = encode(demo, ["something much longer and quite different", "a red door", ""])[1]
    for name in ("video", "audio"):
        torch.testing.assert_close(getattr(among, name), getattr(alone, name), rtol=0, atol=2e-5)


def test_whitespace_around_a_prompt_does_not_matter(demo: Components) -> None:
    plain, spaced = encode(demo, ["a red door", "\t a red door \n"])
    torch.testing.assert_close(plain.video, spaced.video, rtol=0, atol=2e-5)


def test_scripts_and_symbols_differ(demo: Components) -> None:
    prompts = ["猫", "犬", "é", "e", "🚪", ""]
    videos = [item.video for item in encode(demo, prompts)]
    for i, one in enumerate(videos):
        for other in videos[i + 1 :]:
            assert (one - other).abs().max() > 1e-2


def test_no_prompts(demo: Components) -> None:
    assert encode(demo, []) == []


def test_bf16() -> None:
    demo = build_demo(dtype=torch.bfloat16)
    reference = encode(build_demo(), ["a red door"])[0]
    embeddings = encode(demo, ["a red door"], dtype=torch.bfloat16)[0]
    assert embeddings.video.dtype == embeddings.audio.dtype == torch.bfloat16
    assert (embeddings.video.float() - reference.video).std() < 0.2
