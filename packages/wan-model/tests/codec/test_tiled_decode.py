"""Decoding by latent frames and tiles against diffusers' decoder on the whole video."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wan_model.codec.latent_codec import LatentCodec
from wan_model.codec.tiled_decode import Tile, TiledDecoder, most_square, split_frame
from wan_model.codec.vae_decoder import VaeDecoder

ROUNDING = 1e-5  # of a range of 2, against another order of the same sums


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max())


@pytest.fixture(scope="module")
def codec(tiny_folder: Any) -> LatentCodec:
    return LatentCodec.from_pretrained(tiny_folder, load_text=False)


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(16, 3, 12, 14, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def whole(codec: LatentCodec, latents: Tensor) -> Tensor:
    """What diffusers makes of them."""
    with torch.no_grad():
        decoded: Tensor = codec.vae.decode(_raw(codec, latents), return_dict=False)[0]
    return decoded[0]


def test_frames_come_as_the_latents_do_and_are_the_videos(codec: LatentCodec, latents: Tensor, whole: Tensor) -> None:
    parts = list(codec.decode_frames(latents))
    assert [part.shape[1] for part in parts] == [1, 4, 4]
    assert off(torch.cat(parts, dim=1), whole) < ROUNDING
    assert off(codec.decode_video(latents[None])[0], whole) < ROUNDING
    (picture,) = codec.decode_frames(latents[:, :1])
    assert off(picture, whole[:, :1]) < ROUNDING


@pytest.mark.parametrize("tiles", [(1, 2), (3, 1), (2, 3)])
def test_tiles_leave_no_seam(codec: LatentCodec, latents: Tensor, whole: Tensor, tiles: tuple[int, int]) -> None:
    tiled = torch.cat(list(codec.decode_frames(latents, tiles=tiles)), dim=1)
    assert off(tiled, codec.decode_video(latents[None])[0]) < 2e-6
    assert off(tiled, whole) < ROUNDING


def test_a_narrower_border_would_show(
    codec: LatentCodec, latents: Tensor, whole: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control; what the outermost value adds is near rounding, what the inner half adds is not."""
    decoder = TiledDecoder(codec.decoder)
    tile = split_frame(96, 112, 1, 2)[0]

    def of_the_tile() -> float:
        pixels = torch.cat(list(decoder.pixels(decoder.features(_raw(codec, latents)), tile)), dim=1)
        return off(pixels, whole[:, :, :, : tile.right])

    assert of_the_tile() < ROUNDING
    monkeypatch.setattr(decoder, "border", decoder.border // 2)
    assert of_the_tile() > 1e-4


def _raw(codec: LatentCodec, latents: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[None, :, None, None, None] for values in (codec.spec.mean, codec.spec.std))
    return latents[None] * std + mean


def test_a_decoder_alone_is_the_autoencoders(tiny_folder: Path, codec: LatentCodec, latents: Tensor) -> None:
    alone = LatentCodec.from_pretrained(tiny_folder, load_vae=False, load_text=False, load_decoder=True)
    assert alone.vae is None
    assert torch.equal(alone.decode_video(latents[None]), codec.decode_video(latents[None]))
    with pytest.raises(ValueError, match="loaded without its vae"):
        alone.encode_video(torch.zeros(1, 3, 1, 32, 32))


def test_it_needs_no_diffusers(tiny_folder: Path) -> None:
    script = """
import sys, torch
from wan_model.codec.latent_codec import LatentCodec
codec = LatentCodec.from_pretrained(sys.argv[1], load_vae=False, load_text=False, load_decoder=True)
assert codec.decode_video(torch.zeros(1, 16, 2, 4, 4)).shape == (1, 3, 5, 32, 32)
assert not {"diffusers", "transformers"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tiny_folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_released_sizes_are_diffusers_too() -> None:
    """Key by key, at the widths of the released autoencoder, and one picture through both."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        theirs = AutoencoderKLWan().eval()
    ours = VaeDecoder.of_state(theirs.config, theirs.state_dict(), "the test")
    raw = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    decoder = TiledDecoder(ours)
    with torch.no_grad():
        wanted = theirs.decode(raw, return_dict=False)[0][0]
    got = torch.cat(list(decoder.pixels(decoder.features(raw), Tile(0, 32, 0, 48))), dim=1)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    assert (decoder.scale, decoder.border) == (4, 12)


def test_weights_of_another_decoder_are_refused(codec: LatentCodec) -> None:
    state = codec.vae.state_dict()
    del state["decoder.conv_out.bias"]
    with pytest.raises(ValueError, match=r"decoder\.conv_out\.bias is missing, expected \[3\]"):
        VaeDecoder.of_state(codec.vae.config, state, "here")
    with pytest.raises(ValueError, match=r"parts that Wan 2\.1's does not have"):
        VaeDecoder({**codec.vae.config, "is_residual": True})


def test_the_frame_is_covered_once() -> None:
    for rows, columns in ((1, 1), (2, 3), (5, 4)):
        seen = torch.zeros(100, 68)
        for tile in split_frame(100, 68, rows, columns):
            seen[tile.top : tile.bottom, tile.left : tile.right] += 1
        assert bool((seen == 1).all())
    assert split_frame(96, 64, 1, 2) == [Tile(0, 96, 0, 32), Tile(0, 96, 32, 64)]
    with pytest.raises(ValueError, match="cannot be cut into 17\\*1 tiles; expected 1 to 16 side by side"):
        split_frame(96, 64, 1, 17)


def test_borders_are_kept_short() -> None:
    assert most_square(1, 480, 832) == (1, 1)
    assert most_square(2, 480, 832) == (1, 2)
    assert most_square(2, 832, 480) == (2, 1)
    assert most_square(4, 480, 832) == (2, 2)
    assert most_square(3, 480, 832) == (1, 3)
