"""Latents to frames, in one process or in several that decode different tiles of every frame.

Shapes: C latent channels, F latent frames, h rows, w columns; t frames decoded together, H rows, W columns of pixels.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from wan_infer.runtime.parallelism import Parallelism
from wan_model.codec.latent_codec import LatentCodec
from wan_model.codec.tiled_decode import Tile, most_square, split_frame
from wan_model.dit.context_parallel import all_gather_single


def decode_frames(
    codec: LatentCodec, latents_CFhw: Float[Tensor, "C F h w"], parallelism: Parallelism, tiles: int = 1
) -> Iterator[Float[Tensor, "3 t H W"]]:
    """The frames of one video in order, RGB in [-1, 1], fp32 on the CPU; every process gets all frames.

    Args:
        codec: with its autoencoder.
        latents_CFhw: normalised, on the device of the autoencoder.
        parallelism: the processes that the tiles of each frame are divided over.
        tiles: of each process.

    Raises:
        ValueError: the frame is too small for that many tiles.
    """
    height, width = (size * codec.spec.spatial_stride for size in latents_CFhw.shape[2:])
    grid = most_square(tiles * parallelism.world_size, height, width)
    if parallelism.world_size == 1:
        yield from codec.decode_frames(latents_CFhw, tiles=grid)
        return
    all_tiles = split_frame(height, width, *grid)
    own_tiles = all_tiles[parallelism.rank * tiles : (parallelism.rank + 1) * tiles]
    features = list(codec.decoder_features(latents_CFhw)) if tiles > 1 else codec.decoder_features(latents_CFhw)
    for parts in zip(*(codec.decode_tile(features, tile) for tile in own_tiles), strict=True):
        yield _gather(list(parts), own_tiles, all_tiles, parallelism.world_size)


def _gather(parts: list[Tensor], own_tiles: list[Tile], all_tiles: list[Tile], world_size: int) -> Tensor:
    """Gather whole frames from the tiles of all processes, which may differ in size by a few pixels."""
    largest = (max(tile.bottom - tile.top for tile in all_tiles), max(tile.right - tile.left for tile in all_tiles))
    length = parts[0].shape[1]
    sent = parts[0].new_zeros(len(own_tiles), 3, length, *largest)
    for slot, part in zip(sent, parts, strict=True):
        slot[:, :, : part.shape[2], : part.shape[3]] = part
    received = sent.new_empty(world_size * len(own_tiles), *sent.shape[1:])
    all_gather_single(received, sent)
    frame = torch.empty(3, length, all_tiles[-1].bottom, all_tiles[-1].right)
    for tile, slot in zip(all_tiles, received.cpu(), strict=True):
        height, width = tile.bottom - tile.top, tile.right - tile.left
        frame[:, :, tile.top : tile.bottom, tile.left : tile.right] = slot[:, :, :height, :width]
    return frame
