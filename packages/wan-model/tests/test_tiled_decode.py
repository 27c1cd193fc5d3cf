"""Decoding by latent frames and tiles against diffusers' decoder on the whole video."""

from typing import Any

import pytest
import torch
from torch import Tensor

from wan_model.codec import LatentCodec
from wan_model.tiled_decode import Tile, TiledDecoder, most_square, split_frame


@pytest.fixture(scope="module")
def codec(tiny_folder: Any) -> LatentCodec:
    return LatentCodec.from_pretrained(tiny_folder, load_text=False)


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(16, 3, 12, 14, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def whole(codec: LatentCodec, latents: Tensor) -> Tensor:
    return codec.decode_video(latents[None])[0]


def test_frames_come_as_the_latents_do_and_are_the_videos(codec: LatentCodec, latents: Tensor, whole: Tensor) -> None:
    parts = list(codec.decode_frames(latents))
    assert [part.shape[1] for part in parts] == [1, 4, 4]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    (picture,) = codec.decode_frames(latents[:, :1])
    assert torch.equal(picture, whole[:, :1])


@pytest.mark.parametrize("tiles", [(1, 2), (3, 1), (2, 3)])
def test_tiles_leave_no_seam(codec: LatentCodec, latents: Tensor, whole: Tensor, tiles: tuple[int, int]) -> None:
    tiled = torch.cat(list(codec.decode_frames(latents, tiles=tiles)), dim=1)
    assert float((tiled - whole).abs().max()) < 2e-6, "of a range of 2"


def test_a_narrower_border_would_show(
    codec: LatentCodec, latents: Tensor, whole: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control; what the outermost value adds is near rounding, what the inner half adds is not."""
    decoder = TiledDecoder(codec.vae)
    tile = split_frame(96, 112, 1, 2)[0]

    def off() -> float:
        pixels = torch.cat(list(decoder.pixels(decoder.features(_raw(codec, latents)), tile)), dim=1)
        return float((pixels - whole[:, :, :, : tile.right]).abs().max())

    assert off() < 2e-6
    monkeypatch.setattr(decoder, "border", decoder.border // 2)
    assert off() > 1e-4


def _raw(codec: LatentCodec, latents: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[None, :, None, None, None] for values in (codec.spec.mean, codec.spec.std))
    return latents[None] * std + mean


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
