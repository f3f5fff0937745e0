"""diffusers' LTX-2 transformer: which of its blocks and attentions the row ops may serve, and timesteps embedded once per value."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.transformers import transformer_ltx2 as stock
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from ltxkern.ops.checks import unplain
from ltxkern.patching.ltx2_block import OPS, FusedAttention, FusedBlock, Held, Modulation
from ltxkern.patching.report import Left, Report, Site
from ltxkern.patching.rules import CONTRACT, FusionPolicy, Rules, joined
from ltxkern.patching.watch import Fused, Group, Part, mix, own_class, stands

# Those of the stock forward that are read below; one that is not known would be dropped.
_MODEL_PARAMETERS = """
    hidden_states audio_hidden_states encoder_hidden_states audio_encoder_hidden_states timestep audio_timestep sigma audio_sigma
    encoder_attention_mask audio_encoder_attention_mask num_frames height width fps audio_num_frames video_coords audio_coords
    isolate_modalities spatio_temporal_guidance_blocks perturbation_mask use_cross_timestep attention_kwargs
    video_self_attention_mask video_keyframes_mask return_dict
"""

# Which of the ops that a block calls as they stand give the bits of their composition; kept for all models.
_EXACT = FusionPolicy("exact")


class FusedModel(Fused):
    """LTX2VideoTransformer3DModel: a timestep per token is embedded once for each distinct value."""

    _ltxkern: Group

    def forward(self: Any, *args: Any, **keywords: Any) -> Any:
        """As the stock one, which also serves timesteps per sample, tracing and autocast."""
        if not stands(self):
            return type(self).forward(self, *args, **keywords)
        timestep = args[4] if len(args) > 4 else keywords.get("timestep")
        if not _by_levels(self, timestep):
            return super().forward(*args, **keywords)
        bound = _SIGNATURE.bind(self, *args, **keywords)
        bound.apply_defaults()
        return _forward(self, **{name: value for name, value in bound.arguments.items() if name != "self"})


_SIGNATURE = inspect.signature(stock.LTX2VideoTransformer3DModel.forward)


def _by_levels(model: Any, timestep: Any) -> bool:
    """Whether there are timesteps per token, and nobody minds that their number of values is asked for."""
    if not isinstance(timestep, Tensor) or timestep.dim() != 2 or timestep.shape[1] < 2 or timestep.is_meta:
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(timestep.device.type):
        return False
    if timestep.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return model._parallel_config is None and all(map(_takes_rows, model.transformer_blocks))


def _takes_rows(block: Any) -> bool:
    """Whether a block knows modulation by rows, and nobody looks at what it is given."""
    hooked = block._forward_pre_hooks or block._forward_hooks or block._backward_pre_hooks or block._backward_hooks
    return isinstance(block, FusedBlock) and not hooked


def _levels(timestep: Tensor) -> tuple[Tensor, Tensor | None]:
    """Flat timesteps to embed, and for those per token which of them each token has."""
    if timestep.dim() < 2 or timestep.shape[1] < 2:
        return timestep.flatten(), None
    values, rows = torch.unique(timestep, return_inverse=True)
    return values, rows


@apply_lora_scale("attention_kwargs")
def _forward(model: Any, **given: Any) -> Any:
    """The stock forward, with modulation by rows where timesteps are per token."""
    x, y = given["hidden_states"], given["audio_hidden_states"]
    batch = x.shape[0]
    timestep = given["timestep"]
    audio_timestep = timestep if given["audio_timestep"] is None else given["audio_timestep"]
    sigma = given["sigma"]
    audio_sigma = sigma if given["audio_sigma"] is None else given["audio_sigma"]
    tables = _tables(model, given)
    x, y = model.proj_in(x), model.audio_proj_in(y)
    if model.config.use_keyframes_abs_pos_embedding and given["video_keyframes_mask"] is not None:
        marker = (given["video_keyframes_mask"] > 0).to(x.dtype)
        x = x + marker * model.keyframes_abs_pos_embedding.to(x.dtype)

    def embed(embedder: Any, values: Tensor, rows: Tensor | None, like: Tensor) -> tuple[Modulation, Modulation]:
        table, embedded = embedder(values, batch_size=batch, hidden_dtype=like.dtype)
        if rows is None:
            table, embedded = (part.view(batch, -1, part.shape[-1]) for part in (table, embedded))
        return Modulation(table, rows), Modulation(embedded, rows)

    levels, audio_levels = _levels(timestep), _levels(audio_timestep)
    base, embedded = embed(model.time_embed, *levels, x)
    audio_base, audio_embedded = embed(model.audio_time_embed, *audio_levels, y)
    prompt = audio_prompt = None
    if model.prompt_modulation and model.config.use_prompt_adaln_single:
        prompt = embed(model.prompt_adaln, sigma.flatten(), None, x)[0].table
        audio_prompt = embed(model.audio_prompt_adaln, audio_sigma.flatten(), None, y)[0].table
    factor = model.config.cross_attn_timestep_scale_multiplier / model.config.timestep_scale_multiplier
    crossed = given["use_cross_timestep"]
    own, audio_own = (_levels(audio_sigma), _levels(sigma)) if crossed else (levels, audio_levels)
    cross = embed(model.av_cross_attn_video_scale_shift, *own, x)[0]
    gate = embed(model.av_cross_attn_video_a2v_gate, own[0] * factor, own[1], x)[0]
    audio_cross = embed(model.av_cross_attn_audio_scale_shift, *audio_own, y)[0]
    audio_gate = embed(model.av_cross_attn_audio_v2a_gate, audio_own[0] * factor, audio_own[1], y)[0]
    context, audio_context = given["encoder_hidden_states"], given["audio_encoder_hidden_states"]
    if model.config.use_prompt_embeddings:
        context = model.caption_projection(context).view(batch, -1, x.shape[-1])
        audio_context = model.audio_caption_projection(audio_context).view(batch, -1, y.shape[-1])
    mask = _bias(given["encoder_attention_mask"], x)
    audio_mask = _bias(given["audio_encoder_attention_mask"], y)
    self_mask = given["video_self_attention_mask"]
    self_mask = None if self_mask is None else (1 - self_mask.to(x.dtype)) * -10000.0
    perturbation, all_perturbed, guided = _perturbation(given, batch)
    attends = not given["isolate_modalities"]
    checkpoints = torch.is_grad_enabled() and model.gradient_checkpointing
    for index, block in enumerate(model.transformer_blocks):
        arguments = (
            *(
                x,
                y,
                context,
                audio_context,
                base,
                audio_base,
                cross,
                audio_cross,
                gate,
                audio_gate,
                prompt,
                audio_prompt,
            ),
            *tables,
            *(mask, audio_mask, self_mask, None, None, None, attends, attends),
            *((perturbation, all_perturbed) if index in guided else (None, False)),
        )
        x, y = model._gradient_checkpointing_func(block, *arguments) if checkpoints else block(*arguments)
    video = _output(x, embedded, model.scale_shift_table, model.norm_out, model.proj_out)
    audio = _output(y, audio_embedded, model.audio_scale_shift_table, model.audio_norm_out, model.audio_proj_out)
    return stock.AudioVisualModelOutput(sample=video, audio_sample=audio) if given["return_dict"] else (video, audio)


def _tables(model: Any, given: dict[str, Any]) -> tuple[Any, ...]:
    """RoPE of video, audio, and of both for the attention between them."""
    x, y = given["hidden_states"], given["audio_hidden_states"]
    coords, audio_coords = given["video_coords"], given["audio_coords"]
    if coords is None:
        sizes = (given["num_frames"], given["height"], given["width"])
        coords = model.rope.prepare_video_coords(x.shape[0], *sizes, x.device, fps=given["fps"])
    if audio_coords is None:
        audio_coords = model.audio_rope.prepare_audio_coords(x.shape[0], given["audio_num_frames"], y.device)
    return (
        model.rope(coords, device=x.device),
        model.audio_rope(audio_coords, device=y.device),
        model.cross_attn_rope(coords[:, 0:1, :], device=x.device),
        model.cross_attn_audio_rope(audio_coords[:, 0:1, :], device=y.device),
    )


def _bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A text mask of ones and zeros as a bias."""
    if mask is None or mask.dim() != 2:
        return mask
    return ((1 - mask.to(like.dtype)) * -10000.0).unsqueeze(1)


def _perturbation(given: dict[str, Any], batch: int) -> tuple[Tensor | None, Any, frozenset[int]]:
    """The mask of spatio-temporal guidance, whether it leaves nothing out, and its blocks."""
    guided = frozenset(given["spatio_temporal_guidance_blocks"] or ())
    mask = given["perturbation_mask"]
    if guided and mask is None:
        mask = torch.zeros((batch,))
    if mask is not None and mask.dim() == 1:
        mask = mask[:, None, None]
    return mask, False if mask is None else torch.all(mask == 0), guided


def _output(x: Tensor, embedded: Modulation, table: Tensor, norm: Any, projection: Any) -> Tensor:
    shift, scale = (part + embedded.table for part in table)
    if embedded.rows is not None:
        shift, scale = shift[embedded.rows], scale[embedded.rows]
    return projection(norm(x) * (1 + scale) + shift)


_NORMS = (
    "norm1",
    "norm2",
    "norm3",
    "audio_norm1",
    "audio_norm2",
    "audio_norm3",
    "audio_to_video_norm",
    "video_to_audio_norm",
)


def is_ltx2(module: nn.Module) -> bool:
    """Whether `fuse_module` knows the very class."""
    return own_class(module) in (
        stock.LTX2VideoTransformer3DModel,
        stock.LTX2VideoTransformerBlock,
        stock.LTX2Attention,
    )


def fuse_module(path: str, module: Any, rules: Rules, report: Report) -> None:
    """Fuse a transformer, a block or an attention of LTX-2, or say why not."""
    kind = own_class(module)
    group = Group()
    if (reason := _against(module, rules)) is not None:
        report.left.append(Left(path, f"{kind.__name__} {reason}"))
        return
    if kind is stock.LTX2VideoTransformer3DModel:
        mix(module, FusedModel, group, group)
        report.add(group)
        return
    sites = {}
    for child, op in _attention_sites(path, module) if kind is stock.LTX2Attention else _block_sites():
        contract = "exact" if rules.exact and op in OPS else CONTRACT
        if (reason := rules.against(op, contract)) is not None:
            report.left.append(Left(joined(path, child), reason))
        else:
            sites[child, op] = Site(joined(path, child), op, contract, group)
    if sites:
        group.sites += sites.values()
        held = Held(sites, group, _EXACT if rules.exact else None)
        mix(module, FusedAttention if kind is stock.LTX2Attention else FusedBlock, held, group)
        for name in ("norm_q", "norm_k") if kind is stock.LTX2Attention else _NORMS:
            mix(getattr(module, name), Part, held, group)
        report.watch(module, group, ("forward",))
        report.add(group)


def _against(module: Any, rules: Rules) -> str | None:
    if rules.exact and isinstance(module, stock.LTX2VideoTransformer3DModel):
        return "stays: the policy is exact, and its products are of fewer rows"
    if (reason := unplain(module, meta=True, hooks=True)) is not None:
        return reason
    if isinstance(module, stock.LTX2VideoTransformer3DModel):
        unknown = inspect.signature(type(module).forward).parameters.keys() - {"self", *_MODEL_PARAMETERS.split()}
        return f"takes {', '.join(sorted(unknown))}, which is not known here" if unknown else None
    if isinstance(module, stock.LTX2VideoTransformerBlock):
        return next(filter(None, (_against_norm(name, getattr(module, name), rules) for name in _NORMS)), None)
    norms = ((name, getattr(module, name)) for name in ("norm_q", "norm_k"))
    for name, norm in norms:
        if type(norm) is not nn.RMSNorm or norm.weight is None:
            return f"has a {name} that is no RMSNorm with a weight"
        if (reason := unplain(norm, meta=rules.meta)) is not None:
            return f"has a {name} that {reason}"
    return None


def _against_norm(name: str, norm: Any, rules: Rules) -> str | None:
    if type(norm) is not stock.RMSNorm or norm.weight is not None:
        return f"has a {name} that is no RMSNorm without a weight"
    reason = unplain(norm, meta=rules.meta)
    return f"has a {name} that {reason}" if reason else None


def _attention_sites(path: str, attention: Any) -> Iterator[tuple[str, str]]:
    """Attention to the text has no positions."""
    if path.rpartition(".")[2] not in ("attn2", "audio_attn2"):
        yield "norm_q", "qk_norm_rope"
    if attention.to_gate_logits is not None:
        yield "to_gate_logits", "head_gate"


def _block_sites() -> Iterator[tuple[str, str]]:
    """Every pass adds what the one before has left, and its norms come with it."""
    both = "gated_residual_rms_norm_modulate"
    for prefix, between in (("", "audio_to_video_norm"), ("audio_", "video_to_audio_norm")):
        yield f"{prefix}norm1", "rms_norm_modulate"
        yield f"{prefix}norm2", both
        yield between, f"{both}_twice"
        yield f"{prefix}norm3", both
        yield f"{prefix}ff", "linear_gelu"
        yield f"{prefix}ff", "gated_residual"
