"""VAE decoding frame by frame and tile by tile, without seams.

The decoder attends over a whole frame at the resolution of the latents only; after its first upsampling there are only
convolutions. That first part, a few per cent of the work, is computed for the whole frame. The rest is computed for a
tile with a border as wide as the receptive field of the convolutions, so a tile's pixels are those of the whole frame
up to rounding. (diffusers decodes each tile from its latents and blends the tiles, which changes the pixels.)

Shapes: F latent frames, h rows and w columns of latents; t frames, H rows, W columns of pixels (t is 1 for the first
latent frame and 4 for each other); C channels.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from wan_model.codec.vae_decoder import FrameCache, UpBlock, VaeDecoder


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows ``top`` to ``bottom`` and columns ``left`` to ``right`` (the last excluded) of the frame, in pixels."""

    top: int
    bottom: int
    left: int
    right: int


def split_frame(height: int, width: int, rows: int, columns: int, multiple: int = 4) -> list[Tile]:
    """Tiles of nearly equal sides that cover a frame, row by row.

    Args:
        height, width: of the frame, pixels.
        rows, columns: tiles along the height and the width.
        multiple: tiles are aligned to this many pixels.

    Raises:
        ValueError: the frame is too small for that many aligned tiles.
    """
    if not (1 <= rows <= height // multiple and 1 <= columns <= width // multiple):
        raise ValueError(
            f"a frame of {width}*{height} cannot be cut into {columns}*{rows} tiles; "
            f"expected 1 to {width // multiple} side by side and 1 to {height // multiple} above each other"
        )

    def cuts(size: int, parts: int) -> list[tuple[int, int]]:
        return list(itertools.pairwise(size // multiple * part // parts * multiple for part in range(parts + 1)))

    return [Tile(*vertical, *across) for vertical in cuts(height, rows) for across in cuts(width, columns)]


def most_square(tiles: int, height: int, width: int) -> tuple[int, int]:
    """The grid (rows, columns) of ``tiles`` tiles with the shortest borders."""
    pairs = [(rows, tiles // rows) for rows in range(1, tiles + 1) if tiles % rows == 0]
    return min(pairs, key=lambda pair: (pair[0] - 1) * width + (pair[1] - 1) * height)


class TiledDecoder:
    """Decodes videos with the weights of a decoder.

    Args:
        decoder: of Wan 2.1.
    """

    def __init__(self, decoder: VaeDecoder) -> None:
        self._post_quant_conv, self._decoder = decoder.post_quant_conv, decoder.decoder
        later = [block for block in list(self._decoder.up_blocks)[1:] if isinstance(block, UpBlock)]
        # Pixels for one value after the first upsampling.
        self.scale = 2 ** sum(block.upsamplers is not None for block in later)
        self.border = _border(later)

    @torch.no_grad()
    def features(self, raw_1CFhw: Float[Tensor, "1 C F h w"]) -> Iterator[Tensor]:
        """The features of each latent frame, the input of all its tiles; the latents are not normalised."""
        frame_cache: FrameCache = {}
        for frame in self._post_quant_conv(raw_1CFhw).split(1, dim=2):
            x = self._decoder.mid_block(self._decoder.conv_in(frame, frame_cache), frame_cache)
            yield self._decoder.up_blocks[0](x, frame_cache)

    @torch.no_grad()
    def pixels(self, features: Iterable[Tensor], tile: Tile) -> Iterator[Float[Tensor, "3 t H W"]]:
        """A tile's pixels, RGB in [-1, 1], for each of ``features`` in their order.

        ``tile`` must be aligned to ``scale`` pixels.
        """
        frame_cache: FrameCache = {}
        for whole in features:
            rows, kept_rows = self._with_border(tile.top, tile.bottom, whole.shape[3])
            columns, kept_columns = self._with_border(tile.left, tile.right, whole.shape[4])
            x = whole[:, :, :, rows, columns]
            for block in list(self._decoder.up_blocks)[1:]:
                x = block(x, frame_cache)
            x = self._decoder.conv_out(F.silu(self._decoder.norm_out(x)), frame_cache)
            yield x[0, :, :, kept_rows, kept_columns].float().clamp(-1, 1)

    def _with_border(self, first: int, end: int, size: int) -> tuple[slice, slice]:
        """For one axis: the slice of the features to decode, and the slice of the result that belongs to the tile."""
        start, stop = max(0, first // self.scale - self.border), min(size, end // self.scale + self.border)
        return slice(start, stop), slice(first - start * self.scale, end - start * self.scale)


def _border(blocks: Sequence[UpBlock]) -> int:
    """Receptive field of the pixels on each side, in values after the first upsampling."""
    reach = 1  # the last convolution, 3 wide
    for block in reversed(blocks):
        if block.upsamplers is not None:
            reach = (reach + 1 + 1) // 2  # a convolution 3 wide on the doubled frame
        reach += 2 * len(block.resnets)
    return reach
