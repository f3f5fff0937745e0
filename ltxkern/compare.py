"""Parity of two results: two mp4 files, or two files of latents, as scores per frame and for the audio."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW, SSIM_SIGMA, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03

PICTURES_ALONE = "--no-audio (audio=False) compares the pictures alone"

FrameScorer = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class SignalScore:
    """How far two signals are apart.

    Attributes:
        relative_l2: |a - b| / |a|.
        cosine: a . b / (|a| |b|).
        max_abs: largest absolute difference.
    """

    relative_l2: float
    cosine: float
    max_abs: float


@dataclass(frozen=True)
class FrameScore:
    """One frame: PSNR in dB (infinite where identical), SSIM, and by name the scores of installed packages."""

    index: int
    psnr: float
    ssim: float
    others: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Scores of b against a.

    Attributes:
        a, b: the files.
        kind: "video" (mp4) or "latents".
        frames: scores per picture; empty for latents.
        latents: scores per tensor, and per latent frame under "video frame <i>"; empty for mp4.
        audio: score of the waveforms of two mp4 files; None where neither has any, or it was left out.
        notes: what was left out, and why.
    """

    a: str
    b: str
    kind: str
    frames: list[FrameScore] = field(default_factory=list)
    latents: dict[str, SignalScore] = field(default_factory=dict)
    audio: SignalScore | None = None
    notes: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Mean and worst of every frame score; PSNR from the mean squared error of all frames."""
        if not self.frames:
            return {}
        errors = [10 ** (-score.psnr / 10) for score in self.frames]
        result = {
            "psnr_mean": psnr_of(sum(errors) / len(errors)),
            "psnr_worst": min(score.psnr for score in self.frames),
            "ssim_mean": sum(score.ssim for score in self.frames) / len(self.frames),
            "ssim_worst": min(score.ssim for score in self.frames),
        }
        for name in self.frames[0].others:
            result[f"{name}_mean"] = sum(score.others[name] for score in self.frames) / len(self.frames)
        return result

    def to_json(self) -> str:
        """Everything, as JSON; an infinite PSNR (identical frames) becomes the string "inf"."""
        return json.dumps(_plain({**asdict(self), "summary": self.summary()}), indent=1)

    def table(self) -> str:
        """Everything, as lines of text."""
        lines = [f"a: {self.a}", f"b: {self.b}"]
        if self.frames:
            names = list(self.frames[0].others)
            lines.append("frame    PSNR dB    SSIM" + "".join(f"{name:>10}" for name in names))
            for score in self.frames:
                others = "".join(f"{score.others[name]:10.5f}" for name in names)
                lines.append(f"{score.index:5d} {score.psnr:10.2f} {score.ssim:7.4f}{others}")
            lines += [f"{name}: {value:.4f}" for name, value in self.summary().items()]
        signals = dict(self.latents) | ({"audio": self.audio} if self.audio is not None else {})
        if signals:
            width = max(len(name) for name in signals)
            lines.append(f"{'signal'.ljust(width)}  relative L2      cosine  max difference")
            for name, signal in signals.items():
                lines.append(
                    f"{name.ljust(width)}  {signal.relative_l2:11.3e} {signal.cosine:11.8f}  {signal.max_abs:14.3e}"
                )
        return "\n".join(lines + self.notes)


def compare_outputs(a: str | Path, b: str | Path, *, perceptual: bool = True, audio: bool = True) -> Comparison:
    """Score one output against another.

    Args:
        a: the reference, .mp4 or .safetensors (keys "video" and "audio").
        b: of the same kind.
        perceptual: also LPIPS and CLIP, where the packages `lpips` and `open_clip` are installed.
        audio: also the sound of two mp4 files.
    Returns:
        The scores.
    Raises:
        ValueError: different kinds, sizes, frame counts, keys or sample rates, values that are not finite, or a damaged file.
        OSError: a file cannot be opened.

    Source: Wang et al. 2004 (SSIM).
    """
    first, second = Path(a), Path(b)
    for path in (first, second):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
    kinds = {path.suffix.lower() for path in (first, second)}
    if kinds == {".safetensors"}:
        return _compare_latents(first, second)
    if kinds == {".mp4"}:
        return _compare_videos(first, second, perceptual, audio)
    raise ValueError(f"expected two .mp4 or two .safetensors files, got {first} and {second}")


def signal_score(a: Tensor, b: Tensor) -> SignalScore:
    """Relative L2, cosine and largest difference, in fp64; two silent signals are equal."""
    x, y = a.double().flatten(), b.double().flatten()
    norm_x, norm_y = float(x.norm()), float(y.norm())
    distance = float((x - y).norm())
    if norm_x == 0.0:
        return SignalScore(0.0 if distance == 0.0 else math.inf, 1.0 if distance == 0.0 else 0.0, _max_abs(x, y))
    cosine = float(x @ y) / (norm_x * norm_y) if norm_y else 0.0
    return SignalScore(distance / norm_x, cosine, _max_abs(x, y))


def _max_abs(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max()) if x.numel() else 0.0


def psnr_of(mean_squared_error: float) -> float:
    """`-10 log10(mse)` for signals in [0, 1]."""
    return math.inf if mean_squared_error == 0 else -10 * math.log10(mean_squared_error)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise ratio in dB of two frames in [0, 1]."""
    return psnr_of(float((a.double() - b.double()).square().mean()))


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of two frames.

    Gaussian window of 11 x 11 (smaller on smaller frames), sigma 1.5, K1 0.01, K2 0.03, valid positions only, mean over channels.

    Args:
        a, b: (C, H, W) in [0, 1].
    """
    size = min(SSIM_WINDOW, (min(a.shape[-2:]) - 1) // 2 * 2 + 1)
    offsets = torch.arange(size, dtype=torch.float32) - size // 2
    weights = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    weights = weights / weights.sum()

    def blur(x: Tensor) -> Tensor:
        rows = F.conv2d(x[:, None], weights.reshape(1, 1, 1, -1))
        return F.conv2d(rows, weights.reshape(1, 1, -1, 1))[:, 0]

    x, y = a.float(), b.float()
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x * mean_x, blur(y * y) - mean_y * mean_y
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    index = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    index = index / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))
    return float(index.mean())


def _compare_latents(a: Path, b: Path) -> Comparison:
    first, second = _load_latents(a), _load_latents(b)
    if set(first) != set(second):
        raise ValueError(f"{a.name} holds {sorted(first)}, {b.name} holds {sorted(second)}: expected the same keys")
    scores: dict[str, SignalScore] = {}
    for name in sorted(first, reverse=True):
        x, y = first[name], second[name]
        if x.shape != y.shape:
            raise ValueError(f"{name}: shapes {tuple(x.shape)} and {tuple(y.shape)} differ")
        for path, tensor in ((a, x), (b, y)):
            wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
            if wrong:
                raise ValueError(f"{path}: {wrong} of {tensor.numel()} values of {name} are not finite")
        scores[name] = signal_score(x, y)
        if name == "video" and x.dim() == 5:
            for frame in range(x.shape[2]):
                scores[f"video frame {frame}"] = signal_score(x[:, :, frame], y[:, :, frame])
    return Comparison(str(a), str(b), "latents", latents=scores)


def _load_latents(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def _compare_videos(a: Path, b: Path, perceptual: bool, sound: bool) -> Comparison:
    scorers, notes = _perceptual_scorers() if perceptual else ({}, [])
    frames = []
    for index, (x, y) in enumerate(zip_longest(_pictures(a), _pictures(b))):
        if x is None or y is None:
            shorter = a if x is None else b
            raise ValueError(f"{shorter} has {index} frames, the other file has more: cut both to one length")
        if x.shape != y.shape:
            sizes = [f"{t.shape[2]}x{t.shape[1]}" for t in (x, y)]
            raise ValueError(f"{a.name} is {sizes[0]}, {b.name} is {sizes[1]}: expected one size")
        others = {name: scorer(x, y) for name, scorer in scorers.items()}
        frames.append(FrameScore(index, psnr(x, y), ssim(x, y), others))
    audio, audio_notes = _compare_audio(a, b) if sound else (None, ["audio: left out as asked for"])
    return Comparison(str(a), str(b), "video", frames=frames, audio=audio, notes=notes + audio_notes)


def _pictures(path: Path) -> Iterator[Tensor]:
    """Frames as (3, H, W) in [0, 1]."""
    with _opened(path) as container:
        if not container.streams.video:
            raise ValueError(f"{path} has no video stream")
        for frame in _decoded(container, path, "video"):
            yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1).float() / 255


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A container; what FFmpeg says of a file that is none is put in words that name it."""
    import av

    try:
        container = av.open(str(path))
    except av.error.InvalidDataError as error:
        raise ValueError(f"{path} is no mp4 that can be read (cut short, or another kind of file): {error}") from error
    with container:
        yield container


def _decoded(container: Any, path: Path, kind: str) -> Iterator[Any]:
    """Frames of the first stream of a kind."""
    import av

    count = 0
    try:
        for frame in container.decode(**{kind: 0}):
            yield frame
            count += 1
    except av.error.FFmpegError as error:
        raise ValueError(f"{path}: {kind} cannot be decoded behind frame {count}: {error}") from error


def _waveform(path: Path) -> tuple[Tensor, int] | None:
    """(channels, samples) fp32 and the sample rate; None without an audio stream."""
    import av

    with _opened(path) as container:
        if not container.streams.audio:
            return None
        rate = int(container.streams.audio[0].rate)
        resampler = av.AudioResampler(format="fltp", rate=rate)
        parts = [
            torch.from_numpy(piece.to_ndarray())
            for frame in _decoded(container, path, "audio")
            for piece in resampler.resample(frame)
        ]
    return (torch.cat(parts, dim=1), rate) if parts else None


def _compare_audio(a: Path, b: Path) -> tuple[SignalScore | None, list[str]]:
    first, second = _waveform(a), _waveform(b)
    if first is None and second is None:
        return None, ["audio: neither file has any"]
    if first is None or second is None:
        raise ValueError(f"{(a if first is None else b)} has no audio, the other file has: {PICTURES_ALONE}")
    (x, rate_x), (y, rate_y) = first, second
    if rate_x != rate_y or x.shape[0] != y.shape[0]:
        raise ValueError(
            f"audio: {x.shape[0]} channels at {rate_x} Hz and {y.shape[0]} channels at {rate_y} Hz: expected the same; "
            f"{PICTURES_ALONE}"
        )
    length = min(x.shape[1], y.shape[1])
    notes = []
    if x.shape[1] != y.shape[1]:
        notes.append(f"audio: {x.shape[1]} and {y.shape[1]} samples; the first {length} are compared")
    return signal_score(x[:, :length], y[:, :length]), notes


def _perceptual_scorers() -> tuple[dict[str, FrameScorer], list[str]]:
    """LPIPS and CLIP where installed, and a note for each that is not."""
    scorers: dict[str, FrameScorer] = {}
    notes = []
    for name, package, build in (("LPIPS", "lpips", _lpips_scorer), ("CLIP", "open_clip", _clip_scorer)):
        if importlib.util.find_spec(package) is None:
            notes.append(f"{name}: not computed, the package {package} is not installed")
        else:
            scorers[name] = build()
    return scorers, notes


def _lpips_scorer() -> FrameScorer:
    """LPIPS with AlexNet; 0 is identical."""
    import lpips

    model = lpips.LPIPS(net="alex", verbose=False).eval()

    def score(a: Tensor, b: Tensor) -> float:
        with torch.no_grad():
            return float(model(a[None] * 2 - 1, b[None] * 2 - 1))

    return score


def _clip_scorer() -> FrameScorer:
    """Cosine of the CLIP ViT-B/32 image embeddings; 1 is identical."""
    from PIL import Image

    open_clip = importlib.import_module("open_clip")
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained="openai")
    model.eval()

    def embed(frame: Tensor) -> Tensor:
        picture = Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).numpy())
        return F.normalize(model.encode_image(preprocess(picture)[None]), dim=-1)

    def score(a: Tensor, b: Tensor) -> float:
        with torch.no_grad():
            return float((embed(a) * embed(b)).sum())

    return score


def _plain(value: Any) -> Any:
    """The value with every float that JSON lacks as a string."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
