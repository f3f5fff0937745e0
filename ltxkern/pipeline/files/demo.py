"""A tiny LTX-2.3 model with random weights, built from a seed in seconds: the whole graph runs on two CPU cores.

Its pictures and sounds are noise. It exists so that every code path can be run and tested without a download.
"""

import math
import zlib
from typing import Any

import torch

from ltxkern.pipeline.files.lora import LoRA
from ltxkern.pipeline.files.lora_kinds import LoRAFactors
from ltxkern.pipeline.files.lora_layout import ModuleNames, read_key
from ltxkern.pipeline.files.official_names import LORA_PREFIX, TRANSFORMER_PREFIX, official_name
from ltxkern.pipeline.model.components import PRODUCTION_CONFIGS, Components, build, component_dtype

TEXT_WIDTH = 32
TEXT_LAYERS = 2
DEMO_TEXT_TOKENS = 256
DEMO_LORA_RANK = 4

# fmt: off
DEMO_CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": PRODUCTION_CONFIGS["transformer"] | {
        "in_channels": 16, "out_channels": 16, "num_attention_heads": 4, "attention_head_dim": 16,
        "cross_attention_dim": 64, "audio_in_channels": 32, "audio_out_channels": 32, "audio_num_attention_heads": 4,
        "audio_attention_head_dim": 8, "audio_cross_attention_dim": 32, "num_layers": 2,
    },
    "connectors": PRODUCTION_CONFIGS["connectors"] | {
        "caption_channels": TEXT_WIDTH, "text_proj_in_factor": TEXT_LAYERS + 1,
        "video_connector_num_attention_heads": 4, "video_connector_attention_head_dim": 16,
        "video_connector_num_layers": 2, "audio_connector_num_attention_heads": 4,
        "audio_connector_attention_head_dim": 8, "audio_connector_num_layers": 2,
        "video_hidden_dim": 64, "audio_hidden_dim": 32,
    },
    "video_vae": PRODUCTION_CONFIGS["video_vae"] | {
        "latent_channels": 16, "block_out_channels": (32, 64, 128, 128), "decoder_block_out_channels": (32, 64, 64, 128),
        "layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1, 1),
    },
    "audio_vae": PRODUCTION_CONFIGS["audio_vae"] | {"base_channels": 32, "latent_channels": 2, "num_res_blocks": 1},
    "vocoder": PRODUCTION_CONFIGS["vocoder"] | {"hidden_channels": 64, "bwe_hidden_channels": 32},
    "upsampler": PRODUCTION_CONFIGS["upsampler"] | {"in_channels": 16, "mid_channels": 64, "num_blocks_per_stage": 1},
}
# fmt: on


def build_demo(seed: int = 0, dtype: torch.dtype = torch.float32, *, device: str | torch.device = "cpu") -> Components:
    """Builds the tiny model; the same seed gives the same weights, and torch's global generator is left as it was.

    Args:
        seed: of the weights.
        dtype: of the weights; they are drawn in fp32 and rounded, and the vocoder stays fp32.
        device: where the weights go.

    Returns:
        Components with every field filled.
    """
    with torch.random.fork_rng(devices=[]):
        modules: dict[str, Any] = {name: build(name, config, device="cpu") for name, config in DEMO_CONFIGS.items()}
        modules["text_encoder"] = demo_text_encoder()
    for name, module in modules.items():
        draw_weights(name, module, seed)
        # The plain method: diffusers' own warns about a cast that is meant here.
        torch.nn.Module.to(module, device=device, dtype=component_dtype(name, dtype))
    return Components(tokenizer=_tokenizer(), **modules)


def demo_lora(seed: int = 0, *, rank: int = DEMO_LORA_RANK) -> dict[str, torch.Tensor]:
    """A LoRA over every Linear of the demo transformer, official key names, fp32; it moves weights by about 30 %."""
    lora = {}
    for name, module in build("transformer", DEMO_CONFIGS["transformer"]).named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        key = LORA_PREFIX + official_name("transformer", f"{name}.").removeprefix(TRANSFORMER_PREFIX)
        out_features, in_features = module.weight.shape
        lora[f"{key}lora_A.weight"] = _normal(seed, f"lora_A/{name}", (rank, in_features)) / math.sqrt(in_features)
        lora[f"{key}lora_B.weight"] = _normal(seed, f"lora_B/{name}", (out_features, rank)) * (0.3 / math.sqrt(rank))
    return lora


def demo_distilled_lora(seed: int = 0, name: str = "demo distilled LoRA") -> LoRA:
    """`demo_lora` as the distilled LoRA of the demo model."""
    names = ModuleNames(None)
    halves: dict[str | None, dict[str, torch.Tensor]] = {}
    for key, tensor in demo_lora(seed).items():
        part = read_key(key)
        assert part is not None, key
        halves.setdefault(names(part.module), {})[part.part] = tensor
    return LoRA(name, {module: LoRAFactors(pair["a"], pair["b"]) for module, pair in halves.items() if module})


def _normal(seed: int, name: str, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """Normal draws that depend on the seed and the name alone, not on the order of the parameters."""
    # The CPU generator looks at 32 bits of its seed only, so both go into one number of that size.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def draw_weights(component: str, module: Any, seed: int) -> None:
    """Fills every parameter of a component with draws of a scale that keeps activations near 1."""
    for name, parameter in module.named_parameters():
        draw = _normal(seed, f"{component}/{name}", parameter.shape)
        parameter.copy_(_scaled(name, draw))
    if component == "vocoder":
        for generator, gain in ((module.vocoder, 0.03), (module.bwe_generator, 0.01)):
            # The residual blocks add up; a quiet last layer keeps the waveform inside [-1, 1].
            generator.conv_out.weight.mul_(gain)
        fill_spectrogram(module.mel_stft)
    if component in ("video_vae", "audio_vae"):
        module.latents_mean.copy_(0.1 * _normal(seed, f"{component}/mean", module.latents_mean.shape))
        module.latents_std.copy_(1 + 0.1 * _normal(seed, f"{component}/std", module.latents_std.shape).clamp(-2, 2))


def _scaled(name: str, draw: torch.Tensor) -> torch.Tensor:
    """Standard normal draws to a parameter that keeps activations near unit scale."""
    if name.endswith(("norm_q.weight", "norm_k.weight")):
        # Sharp attention: over hundreds of text rows an even one would average the prompt away.
        return 2 + 0.1 * draw
    if draw.ndim == 1:
        return 1 + 0.1 * draw if name.endswith("weight") else 0.05 * draw
    if name.endswith("scale_shift_table"):
        return 0.4 * draw
    if name.endswith(("learnable_registers", "embed_tokens.weight")):
        return draw
    if "upsamplers" in name and draw.ndim == 3:
        # Transposed convolution (in, out, kernel): two taps of each input channel meet in an output sample.
        return draw / math.sqrt(2 * draw.shape[0])
    return draw / math.sqrt(math.prod(draw.shape[1:]))


def fill_spectrogram(mel_stft: Any) -> None:
    """Windowed Fourier rows and triangular mel filters, which a checkpoint would bring along."""
    basis = mel_stft.stft_fn.forward_basis
    rows, _, length = basis.shape
    window = torch.hann_window(length, dtype=torch.float64)
    angle = 2 * math.pi / length * torch.outer(torch.arange(rows // 2), torch.arange(length)).double()
    basis.copy_(torch.cat([angle.cos() * window, -angle.sin() * window])[:, None])
    mel_stft.stft_fn.inverse_basis.copy_(basis)
    filters, bins = mel_stft.mel_basis.shape
    # Mel scale 2595 log10(1 + f / 700), from 0 to half of 16 kHz.
    edges = 700 * (10 ** (torch.linspace(0, math.log10(1 + 8000 / 700), filters + 2, dtype=torch.float64)) - 1)
    frequency = torch.linspace(0, 8000, bins, dtype=torch.float64)
    rising = (frequency - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequency) / (edges[2:] - edges[1:-1])[:, None]
    mel_stft.mel_basis.copy_(torch.minimum(rising, falling).clamp(min=0))


def demo_text_encoder(words: int | None = None) -> Any:
    """The text encoder without its weights drawn; on the meta device where that is the default.

    Args:
        words: rows of its vocabulary; None for those of the demo's tokenizer.
    """
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": words or len(_vocabulary()),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config).eval().requires_grad_(False)


def _vocabulary() -> dict[str, int]:
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = ["<pad>", "<bos>", "<eos>", *sorted(ByteLevel.alphabet())]
    return {symbol: index for index, symbol in enumerate(symbols)}


def _tokenizer() -> Any:
    """One token per byte, BOS in front: any text in any script has its own tokens."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = _vocabulary()
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=DEMO_TEXT_TOKENS,
        padding_side="left",
    )
