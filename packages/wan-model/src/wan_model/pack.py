"""The batch format: samples of any shape packed into one sequence of tokens.

Shapes: S tokens of the pack (padding included), C values of a token, B samples, T text length, D text width, R text
tokens of all samples without padding;
of one latent: C channels, F frames, H rows, W columns.

A latent [C, F, H, W] becomes F/pf × H/ph × W/pw tokens in the order (frame, row, column); inside a token the order is
(pf, ph, pw, channel) with the channel running fastest, as NVIDIA's recipe stores it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from wan_model.config import OFFICIAL_TEXT_LENGTH, PatchSize

Grid = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class PackLayout:
    """The position of each sample in a pack.

    Attributes:
        grids: tokens along (frames, rows, columns) of each sample, in order.
        padding: tokens after the last sample that belong to none; no sample attends to them and no loss counts them.
    """

    grids: tuple[Grid, ...]
    padding: int = 0

    def __post_init__(self) -> None:
        if not self.grids:
            raise ValueError("a pack must hold at least one sample")
        if any(len(grid) != 3 or min(grid) < 1 for grid in self.grids):
            raise ValueError(f"grids are {self.grids}; each must be three positive counts of tokens")
        if self.padding < 0:
            raise ValueError(f"padding is {self.padding} tokens; it cannot be negative")

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample."""
        return tuple(f * h * w for f, h, w in self.grids)

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """The first token of each sample, and of the padding: B+1 numbers."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        return tuple(starts)

    @property
    def num_samples(self) -> int:
        """Samples in the pack."""
        return len(self.grids)

    @property
    def valid(self) -> int:
        """Tokens that belong to samples."""
        return self.offsets[-1]

    @property
    def total(self) -> int:
        """Tokens computed, padding included."""
        return self.valid + self.padding

    def padded_to(self, multiple: int) -> "PackLayout":
        """The same samples with the least padding that makes ``total`` a multiple."""
        if multiple < 1:
            raise ValueError(f"cannot pad to a multiple of {multiple}; it must be at least 1")
        return PackLayout(self.grids, -self.valid % multiple)


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """The rows of a pack that one rank holds.

    Attributes:
        layout: of the whole pack.
        start, stop: the rows, out of ``layout.total``.
    """

    layout: PackLayout
    start: int
    stop: int

    @classmethod
    def whole(cls, layout: PackLayout) -> "TokenRows":
        """All rows, padding included."""
        return cls(layout, 0, layout.total)

    def part(self, rank: int, ranks: int) -> "TokenRows":
        """The rows of one of several ranks that divide these rows evenly.

        Raises:
            ValueError: they cannot be divided evenly.
        """
        share, rest = divmod(self.stop - self.start, ranks)
        if rest:
            raise ValueError(
                f"{self.stop - self.start} tokens cannot be shared evenly by {ranks} ranks; "
                "pad the pack to a multiple (pack_latents has multiple, PackLayout has padded_to)"
            )
        return TokenRows(self.layout, self.start + rank * share, self.start + (rank + 1) * share)

    @functools.cached_property
    def segments(self) -> tuple[tuple[int, int, int], ...]:
        """(sample, first row, end) of each sample that has rows here, relative to ``start`` and without gaps.

        Padding counts to the last sample, whose modulation it uses without effect.
        """
        ends = [*self.layout.offsets[1:-1], self.layout.total]
        found = []
        for sample, (first, end) in enumerate(zip(self.layout.offsets, ends, strict=False)):
            first, end = max(first, self.start), min(end, self.stop)
            if first < end:
                found.append((sample, first - self.start, end - self.start))
        return tuple(found)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a copy from the host does not wait for the device.

    From pageable memory it would wait until all work queued on the GPU is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # itself if it is pinned
    return tensor.to(device, non_blocking=True)


@functools.lru_cache(maxsize=16)
def sample_index(layout: PackLayout, device: torch.device) -> Int[Tensor, " S"]:
    """The sample that each token belongs to; padding counts to the last one."""
    lengths = list(layout.lengths)
    lengths[-1] += layout.padding
    # The result is cached, and a tensor created in inference mode could not be used in training later.
    with torch.inference_mode(False):
        index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        return to_device(index, device)


@dataclasses.dataclass
class PackedText:
    """Text embeddings of true length, one after another.

    For short captions the zero padding to the model's text length is most of the bytes of a pack. It is therefore added
    on the device, by ``padded``, and travels neither between processes nor to the device.

    Attributes:
        rows_RD: the embeddings of all samples, R tokens in all.
        places_R: where each row belongs, out of B * T.
        samples, length: B and T.
    """

    rows_RD: Float[Tensor, "R D"]
    places_R: Int[Tensor, " R"]
    samples: int
    length: int

    @classmethod
    def of(cls, embeddings: Sequence[Float[Tensor, "_ D"]], length: int) -> "PackedText":
        """Concatenate embeddings that will be padded to ``length``.

        Raises:
            ValueError: there is no embedding, or one is longer than ``length``.
        """
        _check_lengths(embeddings, length)
        places = [torch.arange(text.shape[0]) + sample * length for sample, text in enumerate(embeddings)]
        return cls(torch.cat(list(embeddings)), torch.cat(places), len(embeddings), length)

    @classmethod
    def join(cls, parts: Sequence["PackedText"]) -> "PackedText":
        """The texts of several packs, in order; padded to the greatest of their lengths."""
        length = max(part.length for part in parts)
        places, samples = [], 0
        for part in parts:
            # Sample and token of each row.
            places.append((part.places_R // part.length + samples) * length + part.places_R % part.length)
            samples += part.samples
        return cls(torch.cat([part.rows_RD for part in parts]), torch.cat(places), samples, length)

    def padded(self) -> Float[Tensor, "B T D"]:
        """Zero-padded, as the model takes them."""
        out = self.rows_RD.new_zeros(self.samples * self.length, self.rows_RD.shape[1])
        return rearrange(out.index_copy_(0, self.places_R, self.rows_RD), "(b t) d -> b t d", b=self.samples)


@dataclasses.dataclass
class LatentPack:
    """A training batch: clean latents of several samples, as tokens, with their text.

    Attributes:
        tokens_SC: normalised latents, patchified; padding rows are zero.
        texts: text embeddings.
        layout: the position of each sample.
        keys: each sample's name, for messages.
    """

    tokens_SC: Float[Tensor, "S C"]
    texts: PackedText
    layout: PackLayout
    keys: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.tokens_SC.shape[0] != self.layout.total:
            raise ValueError(f"{self.tokens_SC.shape[0]} tokens were given for a layout of {self.layout.total}")
        if not (self.texts.samples == len(self.keys) == self.layout.num_samples):
            raise ValueError(
                f"{self.texts.samples} texts and {len(self.keys)} keys for {self.layout.num_samples} samples"
            )

    @property
    def text_BTD(self) -> Float[Tensor, "B T D"]:
        """The text embeddings, zero-padded; computed at every access."""
        return self.texts.padded()

    def _with_tensors(self, move: Callable[[Tensor], Tensor], move_text: Callable[[Tensor], Tensor]) -> "LatentPack":
        texts = dataclasses.replace(
            self.texts, rows_RD=move_text(self.texts.rows_RD), places_R=move(self.texts.places_R)
        )
        return dataclasses.replace(self, tokens_SC=move(self.tokens_SC), texts=texts)

    def pin_memory(self) -> "LatentPack":
        """The same pack in page-locked memory."""
        return self._with_tensors(torch.Tensor.pin_memory, torch.Tensor.pin_memory)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "LatentPack":
        """The same pack on another device, without waiting for it; ``dtype`` applies only to the text."""
        return self._with_tensors(
            lambda tensor: to_device(tensor, device),
            # Converted after the copy, which must be one between equal types to be asynchronous.
            lambda rows: to_device(rows, device).to(dtype or rows.dtype),
        )


def latent_grid(latent: Tensor, patch_size: PatchSize) -> Grid:
    """Tokens along (frames, rows, columns) of one latent [C, F, H, W].

    Raises:
        ValueError: the patch does not divide the latent.
    """
    if latent.ndim != 4:
        raise ValueError(f"a latent has the shape [C, F, H, W]; got {tuple(latent.shape)}")
    sizes = tuple(latent.shape[1:])
    if any(size % patch or size < patch for size, patch in zip(sizes, patch_size, strict=True)):
        raise ValueError(f"the patch {patch_size} does not divide a latent of frames, rows, columns {sizes}")
    f, h, w = (size // patch for size, patch in zip(sizes, patch_size, strict=True))
    return f, h, w


def patchify(latent: Float[Tensor, "C F H W"], patch_size: PatchSize = (1, 2, 2)) -> Float[Tensor, "S K"]:
    """Cut a latent into tokens (see the module's docstring for the order)."""
    latent_grid(latent, patch_size)
    pf, ph, pw = patch_size
    return rearrange(latent, "c (f pf) (h ph) (w pw) -> (f h w) (pf ph pw c)", pf=pf, ph=ph, pw=pw)


def unpatchify(tokens: Float[Tensor, "S K"], grid: Grid, patch_size: PatchSize = (1, 2, 2)) -> Float[Tensor, "C F H W"]:
    """The inverse of ``patchify`` for a sample of the given grid."""
    (f, h, w), (pf, ph, pw) = grid, patch_size
    return rearrange(tokens, "(f h w) (pf ph pw c) -> c (f pf) (h ph) (w pw)", f=f, h=h, w=w, pf=pf, ph=ph, pw=pw)


def _check_lengths(embeddings: Sequence[Tensor], length: int) -> None:
    if not embeddings:
        raise ValueError("there are no text embeddings to pad; expected one a sample")
    longest = max(embedding.shape[0] for embedding in embeddings)
    if longest > length:
        raise ValueError(f"a text embedding has {longest} tokens; the model takes at most {length}")


def pad_text(embeddings: Sequence[Float[Tensor, "_ D"]], length: int) -> Float[Tensor, "B T D"]:
    """Stack text embeddings of true length into [B, T, D], zero-padded.

    Raises:
        ValueError: there is no embedding, or one is longer than ``length``.
    """
    _check_lengths(embeddings, length)
    out = embeddings[0].new_zeros(len(embeddings), length, embeddings[0].shape[1])
    for row, embedding in zip(out, embeddings, strict=True):
        row[: embedding.shape[0]] = embedding
    return out


def pack_latents(
    latents: Sequence[Float[Tensor, "C _ _ _"]],
    texts: Sequence[Float[Tensor, "_ D"]],
    keys: Sequence[str],
    *,
    text_length: int = OFFICIAL_TEXT_LENGTH,
    patch_size: PatchSize = (1, 2, 2),
    multiple: int = 1,
) -> LatentPack:
    """Pack samples into one sequence of tokens.

    Args:
        latents: normalised latents, one per sample, of any shapes.
        texts: text embeddings of true length, one per sample.
        keys: names, one per sample.
        text_length: tokens that texts are zero-padded to.
        patch_size: latent positions (frames, rows, columns) of one token.
        multiple: pad the whole pack to a multiple of this many tokens (tensor and context parallelism need it).

    Raises:
        ValueError: nothing to pack, counts that differ, or a latent that the patch does not divide.
    """
    if not (len(latents) == len(texts) == len(keys)):
        raise ValueError(f"{len(latents)} latents, {len(texts)} texts and {len(keys)} keys; the counts must be equal")
    layout = PackLayout(tuple(latent_grid(latent, patch_size) for latent in latents)).padded_to(multiple)
    rows = [patchify(latent, patch_size) for latent in latents]
    if layout.padding:
        rows.append(rows[0].new_zeros(layout.padding, rows[0].shape[1]))
    return LatentPack(torch.cat(rows), PackedText.of(texts, text_length), layout, tuple(keys))
