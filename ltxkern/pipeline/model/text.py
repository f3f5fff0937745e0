"""Prompts to context embeddings: Gemma 3 hidden states of every layer, text projections, connectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_TEXT_TOKENS = 1024


@dataclass(frozen=True)
class PromptEmbeddings:
    """Context of one prompt for the transformer: video (1, L, Dv) and audio (1, L, Da); every row is valid."""

    video: Tensor
    audio: Tensor


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (B, L) of stripped prompts: truncated, padded on the left, BOS and no EOS.

    L is 1024, or the tokenizer's own limit where that is less.
    """
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"prompts: expected strings, got {type(prompt).__name__}")
    tokens = tokenizer(
        [prompt.strip() for prompt in prompts],
        padding="max_length",
        padding_side="left",
        max_length=min(MAX_TEXT_TOKENS, tokenizer.model_max_length),
        truncation=True,
        add_special_tokens=True,
        return_tensors="pt",
    )
    return tokens["input_ids"], tokens["attention_mask"]


def text_hidden_states(text_encoder: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states of all layers, (B, L, D, layers + 1): scaled embeddings, each layer, the last after the norm.

    The text model below the language-model head is called, so no logits over the vocabulary are made.
    """
    model = getattr(text_encoder, "model", text_encoder)
    model = getattr(model, "language_model", model)
    output = model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False)
    return torch.stack(output.hidden_states, dim=-1)


def connect(connectors: Any, hidden_states: Tensor, attention_mask: Tensor) -> PromptEmbeddings:
    """Context of one prompt from its hidden states (1, L, D, layers + 1) and mask (1, L).

    Per token and layer x / sqrt(mean(x^2) + 1e-6), padding zeroed, one projection and one connector per modality;
    padded places hold learned registers afterwards, so that every row is valid.
    """
    video, audio, _ = connectors(hidden_states, attention_mask)
    return PromptEmbeddings(video, audio)


@torch.no_grad()
def encode_prompts(
    tokenizer: Any,
    text_encoder: Any,
    connectors: Any,
    prompts: Sequence[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> list[PromptEmbeddings]:
    """Encodes prompts: all of them in one batch through Gemma 3, one at a time through the connectors.

    Args:
        tokenizer, text_encoder: Gemma 3 (or the text model alone).
        connectors: diffusers' LTX2TextConnectors.
        prompts: texts, each stripped and cut at 1024 tokens.
        device: where the modules are.
        dtype: dtype of the embeddings.

    Returns:
        One PromptEmbeddings per prompt, video (1, L, Dv) and audio (1, L, Da).

    Numerical contract: rounded; equal to the official text path in fp32.
    """
    if not prompts:
        return []
    input_ids, mask = (tensor.to(device) for tensor in tokenize(tokenizer, prompts))
    hidden = text_hidden_states(text_encoder, input_ids, mask)
    weight = next(connectors.parameters())
    embeddings = []
    for index in range(len(prompts)):
        item = slice(index, index + 1)
        context = connect(connectors, hidden[item].to(weight.dtype), mask[item])
        embeddings.append(PromptEmbeddings(context.video.to(dtype), context.audio.to(dtype)))
    return embeddings
