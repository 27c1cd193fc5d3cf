"""Frame counts and sides that the models of Wan 2.1 take, checked by name. Imports no torch.

Clips are cut, videos are requested and shapes are planned in these units before a model is read. A model's own strides
may be passed instead.
"""

# Of Wan 2.1: frames per latent frame after the first, and pixels per token in both directions, because the autoencoder
# divides sides by 8 and the transformer's patch by 2 more.
TEMPORAL_STRIDE = 4
SIDE_MULTIPLE = 16


def trim_frames(frames: int, stride: int = TEMPORAL_STRIDE) -> int:
    """The largest 4n+1 of at most ``frames`` (0 for 0), because the autoencoder drops further frames silently.

    Args:
        frames: a number of frames.
        stride: frames per latent frame after the first.
    """
    return 0 if frames < 1 else frames - (frames - 1) % stride


def check_frames(name: str, frames: int, stride: int = TEMPORAL_STRIDE) -> None:
    """Refuse a number of frames that cannot be encoded whole.

    Args:
        name: of the setting, for the message.
        frames: its value.
        stride: frames per latent frame after the first.

    Raises:
        ValueError: it is not 4n+1; the message names the nearest ones.
    """
    lower = trim_frames(frames, stride)
    if frames != lower or frames < 1:
        nearest = f"nearest are {lower} and {lower + stride}" if lower else "nearest is 1"
        raise ValueError(f"{name} is {frames}; the autoencoder takes {stride}n+1 frames: the {nearest}")


def check_side(name: str, side: int, multiple: int = SIDE_MULTIPLE) -> None:
    """Refuse a side of a frame that the encoders would cut silently.

    Args:
        name: of the setting, for the message.
        side: its value, in pixels.
        multiple: pixels per token.

    Raises:
        ValueError: it is no positive multiple of ``multiple``; the message names the nearest ones.
    """
    lower = side - side % multiple
    if side != lower or side < multiple:
        nearest = f"nearest are {lower} and {lower + multiple}" if lower >= multiple else f"nearest is {multiple}"
        raise ValueError(f"{name} is {side} pixels; it must be a multiple of {multiple}: the {nearest}")


def nearest_side(side: int) -> int:
    """The multiple of 16 nearest to a side, in pixels, at least 16."""
    return max(1, round(side / SIDE_MULTIPLE)) * SIDE_MULTIPLE
