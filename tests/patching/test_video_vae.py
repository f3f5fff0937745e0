"""The patched LTX-2 video VAE pads in place: the bits of its own forwards with fewer copies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from examples.patch_vae import small_vae
from ltxkern.nn import PixelNormSiLU
from ltxkern.patch import patch
from ltxkern.patching.video_vae import depth_to_space


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_video_vae_pads_in_place_with_the_bits_of_its_own_forwards(dtype: torch.dtype) -> None:
    vae = small_vae().to(dtype)
    latent, pictures = torch.randn(2, 8, 3, 2, 3).to(dtype), torch.randn(1, 3, 9, 64, 32).to(dtype)
    keys, structure = list(vae.state_dict()), str(vae)

    def both() -> list[Tensor]:
        return [vae.decode(latent).sample, vae.encode(pictures).latent_dist.mean]

    with patch(vae) as handle:
        assert len(handle.sites) == 22
        assert list(vae.state_dict()) == keys
        assert patch(vae).sites == []
        joined: list[int] = []
        real = torch.concatenate
        with pytest.MonkeyPatch.context() as watch:
            watch.setattr(torch, "concatenate", lambda *args, **more: (joined.append(1), real(*args, **more))[1])
            found = both()
            # What is left stands before no fused norm: the first convolutions, and those that change the resolution.
            assert len(joined) == 2 + 4 + 4
            with torch.enable_grad():
                expected = both()
        assert len(joined) > 2 * (2 + 4 + 4)
        assert all(map(torch.equal, found, expected))
    assert str(vae) == structure


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("stride", [(2, 2, 2), (2, 1, 1), (1, 2, 2)], ids=str)
def test_depth_to_space_and_frames_keep_the_layout(stride: tuple[int, int, int], last: bool) -> None:
    """As the stacks compute it, and without gaps: what follows copies nothing."""
    t, h, w = stride
    x = torch.randn(1, 3 * t * h * w, 4, 5, 6)
    x = x.to(memory_format=torch.channels_last_3d) if last else x
    y = x.reshape(1, -1, t, h, w, 4, 5, 6).permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
    found = depth_to_space(x, stride)
    assert torch.equal(found, y[:, :, t - 1 :])
    padded = PixelNormSiLU().with_frames(found, 2, 1)
    plain = PixelNormSiLU()(found)
    assert torch.equal(padded, torch.cat((plain[:, :, :1], plain[:, :, :1], plain, plain[:, :, -1:]), 2))
    for tensor in (found, padded):
        assert tensor.is_contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
