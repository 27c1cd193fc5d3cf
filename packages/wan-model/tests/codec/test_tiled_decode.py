"""Decoding by latent frames and tiles against diffusers' decoder on the whole video."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wan_model.codec.latent_codec import LatentCodec
from wan_model.codec.tiled_decode import Tile, TiledDecoder, most_square, split_frame
from wan_model.codec.vae_decoder import CausalConv, VaeDecoder
from wan_model.testing import rounding_scale
from wan_model.testing.rounding import FACTOR

# Tiles of a wide frame have neighbours left and right, of a high one above and below, and their borders end inside it.
FRAMES = {"wide": (16, 3, 4, 14), "high": (16, 3, 14, 4), "large": (16, 2, 11, 14)}


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def off(got: Tensor, wanted: Tensor) -> float:
    """Root mean square of what two videos differ by."""
    assert got.shape == wanted.shape
    return rms(got.double() - wanted.double())


def rounding_of_pixels(decoder: VaeDecoder, raw: Tensor) -> float:
    """How far rounding may move pixels, root mean square; no pixel's sums grow with the frame."""
    double = TiledDecoder(copy.deepcopy(decoder).double())
    frame = Tile(0, 8 * raw.shape[3], 0, 8 * raw.shape[4])

    def decode() -> dict[str, Tensor]:
        return {"pixels": torch.cat(list(double.pixels(double.features(raw.double()), frame)), dim=1).double()}

    return FACTOR * rms(rounding_scale(decode, samples=2)["pixels"])


@pytest.fixture(scope="module")
def codec(tiny_folder: Any) -> LatentCodec:
    return LatentCodec.from_pretrained(tiny_folder, load_text=False)


@pytest.fixture(scope="module")
def rounding(codec: LatentCodec) -> float:
    return rounding_of_pixels(codec.decoder, _raw(codec, latents_of("wide", 4)[:, :, :, :4]))


@functools.cache
def latents_of(frame: str, seed: int) -> Tensor:
    return torch.randn(FRAMES[frame], generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def whole(codec: LatentCodec) -> Callable[[str, int], Tensor]:
    """What diffusers makes of ``latents_of``."""

    @functools.lru_cache(maxsize=4)
    @torch.no_grad()
    def decode(frame: str, seed: int) -> Tensor:
        decoded: Tensor = codec.vae.decode(_raw(codec, latents_of(frame, seed)), return_dict=False)[0]
        return decoded[0]

    return decode


@pytest.mark.rounding
def test_frames_come_as_the_latents_do_and_are_the_videos(
    codec: LatentCodec, whole: Callable[[str, int], Tensor], seed: int, rounding: float
) -> None:
    latents, wanted = latents_of("wide", seed), whole("wide", seed)
    parts = list(codec.decode_frames(latents))
    assert [part.shape[1] for part in parts] == [1, 4, 4]
    assert off(torch.cat(parts, dim=1), wanted) < rounding
    assert off(codec.decode_video(latents[None])[0], wanted) < rounding
    (picture,) = codec.decode_frames(latents[:, :1])
    assert off(picture, wanted[:, :1]) < rounding


@pytest.mark.rounding
@pytest.mark.parametrize(("frame", "tiles"), [("wide", (1, 2)), ("high", (3, 1)), ("large", (2, 3))])
def test_tiles_leave_no_seam(
    codec: LatentCodec,
    whole: Callable[[str, int], Tensor],
    seed: int,
    rounding: float,
    frame: str,
    tiles: tuple[int, int],
) -> None:
    tiled = torch.cat(list(codec.decode_frames(latents_of(frame, seed), tiles=tiles)), dim=1)
    assert off(tiled, whole(frame, seed)) < rounding


@pytest.mark.rounding
def test_a_narrower_border_would_show(
    codec: LatentCodec,
    whole: Callable[[str, int], Tensor],
    seed: int,
    rounding: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Control; what the outermost value adds is near rounding, what the inner half adds is not."""
    decoder, latents = TiledDecoder(codec.decoder), latents_of("wide", seed)
    tile = split_frame(32, 112, 1, 2)[0]

    def of_the_tile() -> float:
        pixels = torch.cat(list(decoder.pixels(decoder.features(_raw(codec, latents)), tile)), dim=1)
        return off(pixels, whole("wide", seed)[:, :, :, : tile.right])

    assert of_the_tile() < rounding
    monkeypatch.setattr(decoder, "border", decoder.border // 2)
    assert of_the_tile() > 3 * rounding


def _raw(codec: LatentCodec, latents: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[None, :, None, None, None] for values in (codec.spec.mean, codec.spec.std))
    return latents[None] * std + mean


def test_each_convolution_keeps_two_frames_and_no_more(codec: LatentCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the bytes that are kept alive: a view of two frames would keep all those that it was cut from."""
    kept: list[tuple[int, int]] = []
    convolve = CausalConv.forward

    def watched(self: CausalConv, x: Tensor, frame_cache: Any = None) -> Tensor:
        out = convolve(self, x, frame_cache)
        if frame_cache is not None and self in frame_cache:
            kept.append((frame_cache[self].untyped_storage().nbytes(), 2 * x[:, :, :1].numel() * x.element_size()))
        return out

    monkeypatch.setattr(CausalConv, "forward", watched)
    latents = latents_of("wide", 4)[:, :, :, :3]
    frames = [part.shape[1] for part in codec.decode_frames(latents)]
    assert frames == [1, 4, 4]
    over_frames = [part for part in codec.decoder.modules() if isinstance(part, CausalConv) and part.kernel_size[0] > 1]
    assert len(kept) >= 2 * len(over_frames)
    assert all(held == two_frames for held, two_frames in kept)


def test_a_decoder_alone_is_the_autoencoders(tiny_folder: Path, codec: LatentCodec) -> None:
    alone = LatentCodec.from_pretrained(tiny_folder, load_vae=False, load_text=False, load_decoder=True)
    assert alone.vae is None
    latents = latents_of("wide", 4)[None, :, :2, :, :3]
    assert torch.equal(alone.decode_video(latents), codec.decode_video(latents))
    with pytest.raises(ValueError, match="loaded without its vae"):
        alone.encode_video(torch.zeros(1, 3, 1, 32, 32))


def test_the_released_architecture_is_diffusers_too() -> None:
    """Key by key, at the widths of the released autoencoder."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        released = AutoencoderKLWan()
        expected = {key: tensor.shape for key, tensor in released.state_dict().items() if key.startswith("decoder.")}
        decoder = VaeDecoder(released.config)
    assert {key: tensor.shape for key, tensor in decoder.decoder.state_dict(prefix="decoder.").items()} == expected
    assert (TiledDecoder(decoder).scale, TiledDecoder(decoder).border) == (4, 12)


@pytest.fixture(scope="module")
def deep() -> tuple[Any, VaeDecoder, float]:
    """The released autoencoder at an eighth of its widths, its decoder, and how far rounding may move pixels."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        theirs = AutoencoderKLWan(base_dim=12).eval()
    ours = VaeDecoder.of_state(theirs.config, theirs.state_dict(), "the test")
    raw = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    return theirs, ours, rounding_of_pixels(ours, raw)


@pytest.mark.rounding
def test_the_released_architecture_gives_diffusers_pixels(deep: tuple[Any, VaeDecoder, float], seed: int) -> None:
    theirs, ours, rounding = deep
    raw = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(seed))
    decoder = TiledDecoder(ours)
    with torch.no_grad():
        wanted = theirs.decode(raw, return_dict=False)[0][0]
    got = torch.cat(list(decoder.pixels(decoder.features(raw), Tile(0, 32, 0, 48))), dim=1)
    assert off(got, wanted) < rounding


def test_weights_of_another_decoder_are_refused(codec: LatentCodec) -> None:
    state = codec.vae.state_dict()
    del state["decoder.conv_out.bias"]
    with pytest.raises(ValueError, match=r"decoder\.conv_out\.bias is missing, expected \[3\]"):
        VaeDecoder.of_state(codec.vae.config, state, "here")
    with pytest.raises(ValueError, match=r"of the autoencoder of Wan 2\.2"):
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
