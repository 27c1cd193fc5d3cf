"""What data preparation, training and sampling must share, with a fingerprint that identifies the latent space."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from wan_model.config_checks import AUTOENCODER, TEXT_ENCODER, TRANSFORMER, check_numbers, check_whole
from wan_model.video_shape import check_frames, check_side

_BOUNDS = {
    "channels": AUTOENCODER["z_dim"],
    "temporal_stride": (1, 256),
    "spatial_stride": (1, 256),
    "text_dim": TEXT_ENCODER["d_model"],
    "text_length": TRANSFORMER["text_length"],
}


# Unknown in records of earlier versions, and to whoever has no part in it; unknown agrees with everything. They are no
# part of the fingerprint, which every sample of a dataset holds, so that earlier datasets remain of the same space.
_OPTIONAL: dict[str, None] = {"tokenizer": None, "fps": None, "text_encoder": None}
_RATE = re.compile(r"[1-9]\d{0,17}(/[1-9]\d{0,17})?")


def _check(values: Mapping[str, Any]) -> None:
    """Refuse what no latent space has, of whatever type; see ``LatentSpec``."""
    for name, bounds in _BOUNDS.items():
        check_whole(f"{name} of the latent space", values[name], *bounds)
    check_numbers("mean of the latent space", values["mean"], values["channels"])
    check_numbers("std of the latent space", values["std"], values["channels"], positive=True)
    if not isinstance(values["model_id"], str):
        raise ValueError(f"model_id of the latent space is {values['model_id']!r:.60}; expected a text")
    for name in ("tokenizer", "text_encoder"):
        if not isinstance(values[name], str | None):
            raise ValueError(f"{name} of the latent space is {values[name]!r:.60}; expected a text or null")
    fps = values["fps"]
    if fps is not None and not (isinstance(fps, str) and _RATE.fullmatch(fps)):
        raise ValueError(f"fps of the latent space is {fps!r:.60}; expected a text such as 16 or 24000/1001, or null")


@dataclasses.dataclass(frozen=True)
class LatentSpec:
    """The properties of a latent space, shared by data preparation, training and sampling.

    Attributes:
        channels: channels of a latent (16).
        temporal_stride: source frames per latent frame after the first (4).
        spatial_stride: source pixels per latent position, both ways (8).
        mean, std: per-channel statistics; a stored latent is ``(mu - mean) / std``.
        text_dim: width of a text embedding (4096).
        text_length: tokens that prompts are cut to (512). A transformer's ``WanConfig.text_length`` is what they are
            zero-padded to; a training run takes it from its data.
        model_id: digest of small tensors of the autoencoder and the text encoder (see
            ``wan_model.weights.model_folder``), which differ between models of equal configuration.
        tokenizer: digest of the tokenizer; None if unknown.
        fps: frames a second of the videos, such as ``16`` or ``24000/1001``; None if unknown, or for images.
        text_encoder: digest of rows of the text encoder's matrices, which may differ where the tensors of ``model_id``
            do not; None if unknown.

    Raises:
        ValueError: a value that no latent space has.
    """

    channels: int
    temporal_stride: int
    spatial_stride: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    text_dim: int
    text_length: int
    model_id: str
    tokenizer: str | None = None
    fps: str | None = None
    text_encoder: str | None = None

    def __post_init__(self) -> None:
        _check(dataclasses.asdict(self))

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of a hash of all fields but ``tokenizer``, ``fps`` and ``text_encoder``."""
        values = {name: value for name, value in self.to_dict().items() if name not in _OPTIONAL}
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and YAML."""
        values = dataclasses.asdict(self)
        return {**values, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: object) -> "LatentSpec":
        """The inverse of ``to_dict``.

        Raises:
            ValueError: a field is missing or unknown, or a value is impossible.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping) or {*values, *_OPTIONAL} != set(fields):
            got = sorted(map(str, values)) if isinstance(values, Mapping) else values
            raise ValueError(
                f"a latent specification has the fields {', '.join(fields)}; got {got!s:.200}: "
                "was it written by another version?"
            )
        _check({**_OPTIONAL, **values})
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})

    def require_same(self, other: "LatentSpec", ours: str, theirs: str) -> None:
        """Refuse to mix latents of two spaces.

        Args:
            other: the specification to compare with.
            ours, theirs: the owners of the two for the message, such as "the dataset in /data/x".

        Raises:
            ValueError: they differ; the message names the fields.
        """
        mine, yours = self.to_dict(), other.to_dict()
        unknown = {key for key in _OPTIONAL if None in (mine[key], yours[key])}
        if differing := ", ".join(
            f"{key} ({mine[key]} against {yours[key]})"
            for key in mine
            if mine[key] != yours[key] and key not in unknown
        ):
            raise ValueError(
                f"{ours} (fingerprint {self.fingerprint}) and {theirs} (fingerprint {other.fingerprint}) are of "
                f"different latent spaces: {differing}; use the same autoencoder, text encoder, tokenizer, text length "
                "and frame rate for both"
            )

    def completed(self, other: "LatentSpec") -> "LatentSpec":
        """This one, with what is unknown of it taken from another one that it agrees with."""
        known = {key: getattr(other, key) for key in _OPTIONAL if getattr(self, key) is None}
        return dataclasses.replace(self, **known)

    @property
    def frame_rate(self) -> Fraction | None:
        """``fps`` as a number."""
        return None if self.fps is None else Fraction(self.fps)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape [C, F, H, W] of the latent of a video of ``frames`` × ``height`` × ``width`` pixels.

        Raises:
            ValueError: a frame count that is not 4n+1, or a side that the strides and the patch do not divide.
        """
        check_frames("the number of frames", frames, self.temporal_stride)
        for name, side in (("height", height), ("width", width)):
            check_side(f"the {name}", side, 2 * self.spatial_stride)
        return (
            self.channels,
            1 + (frames - 1) // self.temporal_stride,
            height // self.spatial_stride,
            width // self.spatial_stride,
        )
