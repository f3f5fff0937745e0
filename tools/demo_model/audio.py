"""Trains the audio VAE on log-mel spectrograms of the world's sounds, and the vocoder on their waveforms."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ltxkern.pipeline.files.demo import fill_spectrogram
from ltxkern.pipeline.sampling.latents import AudioLatentShape
from tools.demo_model.configuration import plain
from tools.demo_model.judge import Clip, hears_pitch, hears_side
from tools.demo_model.muon import Muon
from tools.demo_model.training import Part, load_modules, seeded
from tools.demo_model.world import COLOURS, HORIZONTAL, Scene, draw_scene, render_sound

FRAMES, FRAME_RATE = 49, 24.0
RATE, HOP, WINDOW, MELS = 16000, 160, 1024, 64
LATENTS = AudioLatentShape.from_pixels(FRAMES, FRAME_RATE).frames
ROWS = 4 * LATENTS - 3


def log_mel(sound: Tensor) -> Tensor:
    """Log-mel magnitudes of sounds (..., N) at 16 kHz, (..., N / 160, 64); a row ends with the samples it is for."""
    filters = _mel_filters()
    padded = pad(sound.reshape(-1, 1, sound.shape[-1]), (WINDOW - HOP, 0))[:, 0]
    spectrum = padded.unfold(-1, WINDOW, HOP) * torch.hann_window(WINDOW)
    mel = torch.fft.rfft(spectrum).abs() @ filters
    return mel.clamp(min=1e-5).log().view(*sound.shape[:-1], -1, MELS)


def _mel_filters() -> Tensor:
    """Triangles on the mel scale, (513, 64)."""
    edges = 700 * (10 ** (torch.linspace(0, math.log10(1 + RATE / 2 / 700), MELS + 2)) - 1)
    frequency = torch.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    rising = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


def sound_of(scene: Scene) -> Tensor:
    """The sound that the demo makes for a scene, (2, N) at 16 kHz: as long as its latents, of the clip's time."""
    return render_sound(scene, FRAMES / FRAME_RATE, RATE)[:, : ROWS * HOP]


def hard_to_hear(scene: Scene) -> bool:
    """Whether a sound changes sides on a tone that meets a bin of the transform, so that few bands tell of it."""
    return any(
        shape.motion in HORIZONTAL and COLOURS[shape.colour].pitch * WINDOW % RATE == 0 for shape in scene.shapes
    )


def encode_audio(vae: Any, mel: Tensor) -> Tensor:
    """Means of the latents, not normalised, (N, C, T, M), from spectrograms (N, 2, 4T - 3, 64)."""
    return vae.encoder(mel)[:, : vae.config.latent_channels]


class AudioVAE(Part):
    """Both halves. What differs between left and right has a loss of its own, or it would be ignored.

    So has what differs in the loudest bands: a tone that meets a bin of the transform fills few, of little weight in a mean.
    """

    name = "audio_vae"
    steps = 1800
    noise, noise_from = 0.1, 500 / steps  # from a share of the steps
    loud = 3.0  # below the loudest, in units of the logarithm: 26 dB
    batch = 3

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.vae = plain("audio_vae")
        self.modules = {"audio_vae": self.vae}
        self.optimiser = Muon(self.parameters().items(), 1.5e-3, vector_lr=1e-3)
        draws = Random(seeded(self.name, "evaluation"))
        self.mels, trained = (
            torch.stack([log_mel(sound_of(draw_scene(draws, held_out=part))) for _ in range(32)])
            for part in (True, False)
        )
        with torch.no_grad():
            self.vae.decoder.conv_out.conv.bias.fill_(float(trained.mean()))

    def losses(self, draws: Random, step: int) -> dict[str, Tensor]:
        mel = torch.stack([log_mel(sound_of(draw_scene(draws))) for _ in range(self.batch)])
        latents = encode_audio(self.vae, mel)
        if step >= self.at(self.noise_from):
            spread = latents.detach().std((0, 2), keepdim=True)
            latents = latents + self.noise * spread * torch.randn_like(latents)
        made = self.vae.decoder(latents)
        sides = ((made[:, 0] - made[:, 1]) - (mel[:, 0] - mel[:, 1])).abs()
        loudest = mel.amax(1)
        loud = loudest > loudest.amax((1, 2), keepdim=True) - self.loud
        return {"error": (made - mel).abs().mean(), "sides": sides.mean(), "loud": sides[loud].mean()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        made = self.vae.decoder(encode_audio(self.vae, self.mels))
        return {"log_mel": float((made - self.mels).abs().mean())}


class AudioEncoder(AudioVAE):
    """The encoder alone, to a decoder that is there: files for users hold none."""

    steps = 600
    noise_from = 0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        load_modules(folder, self.name, self.modules)
        self.vae.decoder.requires_grad_(False)
        self.optimiser = Muon(self.parameters().items(), 1.5e-3, vector_lr=1e-3)


class Vocoder(Part):
    """The vocoder at 16 kHz, on true spectrograms first and on decoded ones later.

    The world holds nothing above 4.5 kHz, so the bandwidth extension has nothing to add: its last layer is zero.
    """

    name = "vocoder"
    steps = 4600
    decoded_from = 1600 / steps
    batch = 3
    rows = 80
    more_often = 0.5  # how many draws ask for a scene that is hard to hear

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.vocoder = plain("vocoder")
        with torch.no_grad():
            self.vocoder.bwe_generator.conv_out.weight.zero_()
            fill_spectrogram(self.vocoder.mel_stft)
        self.vocoder.bwe_generator.requires_grad_(False)
        self.modules = {"vocoder": self.vocoder}
        self.vae = plain("audio_vae").requires_grad_(False)
        load_modules(folder, AudioVAE.name, {"audio_vae": self.vae})
        self.optimiser = Muon(self.parameters().items(), 1.5e-3, vector_lr=1e-3)
        draws = Random(seeded(self.name, "evaluation"))
        self.scenes = [draw_scene(draws, held_out=True, shapes=1) for _ in range(24)]

    @torch.no_grad()
    def _decoded(self, mel: Tensor) -> Tensor:
        latents = encode_audio(self.vae, mel)
        return self.vae.decoder(latents + 0.05 * latents.std() * torch.randn_like(latents))

    def losses(self, draws: Random, step: int) -> dict[str, Tensor]:
        mels, sounds = [], []
        for _ in range(self.batch):
            hard, scene = draws.random() < self.more_often, draw_scene(draws)
            while hard and not hard_to_hear(scene):
                scene = draw_scene(draws)
            sound = sound_of(scene)
            mel = log_mel(sound)
            if step >= self.at(self.decoded_from):
                mel = self._decoded(mel[None])[0]
            start = draws.randrange(ROWS - self.rows + 1)
            mels.append(mel[:, start : start + self.rows])
            sounds.append(sound[:, start * HOP : (start + self.rows) * HOP])
        sound, made = torch.stack(sounds), self.vocoder.vocoder(torch.stack(mels))
        # Quiet stretches count as well: each is measured against its own loudness, within limits.
        loudness = sound.square().mean((1, 2), keepdim=True).sqrt().clamp(min=0.03)
        return {"error": ((made - sound) / loudness).square().mean()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        noise, power, pitch, side = 0.0, 0.0, [], []
        for scene in self.scenes:
            sound = sound_of(scene)
            made = self.vocoder(self._decoded(log_mel(sound)[None]))[0]
            noise += float((made[:, ::3] - sound).square().sum())
            power += float(sound.square().sum())
            clip = Clip(torch.empty(0), made, 3 * RATE)
            pitch.append(hears_pitch(clip, scene))
            side.append(hears_side(clip, scene, 1.5))
        count = len(self.scenes)
        return {"decibels": 10 * math.log10(power / noise), "pitch": sum(pitch) / count, "side": sum(side) / count}
