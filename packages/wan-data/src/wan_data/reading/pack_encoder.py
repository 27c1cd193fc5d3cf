"""Samples to packs: decode without running code, check, choose packs, pack.

L text tokens, D text width; a latent is [C, F, H, W].
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wan_data.energon.samples import RawSample
from wan_data.reading.packing import full_packs, usable_capacity
from wan_data.shards.reader import StoredSample
from wan_model.config import PatchSize
from wan_model.latent_spec import LatentSpec
from wan_model.pack import LatentPack, latent_grid, pack_latents


@dataclasses.dataclass(slots=True)
class LatentSample:
    """A decoded sample.

    Attributes:
        __key__: its key in the shard.
        __restore_key__: where Energon finds it again when a state is loaded.
        latent: normalised latent [C, F, H, W].
        text: text embedding [L, D] without padding.
        tokens: number of tokens of the latent.
        name: its key; in a blend, preceded by the name of its dataset.
    """

    __key__: str
    __restore_key__: tuple[Any, ...]
    latent: Tensor
    text: Tensor
    tokens: int
    name: str


@dataclasses.dataclass(slots=True)
class PackedSample:
    """A pack, with the restore keys of its samples once Energon has set them."""

    pack: LatentPack
    __restore_key__: tuple[Any, ...] = ()


class PackEncoder:
    """Turns the samples of a dataset into packs.

    Args:
        capacity: tokens of a pack, padding included.
        patch_size: latent positions (frames, rows, columns) of a token.
        text_length: tokens that texts are padded to.
        pad_multiple: packs are padded to a multiple of this many tokens.
        seed: of the order of packs.
        spec: the latent space of the dataset, if known.
        carry: carry samples of the emptiest packs over to the next buffer.
    """

    def __init__(
        self,
        *,
        capacity: int,
        patch_size: PatchSize,
        text_length: int,
        pad_multiple: int,
        seed: int,
        spec: LatentSpec | None,
        carry: bool,
    ) -> None:
        self.capacity, self.patch_size, self.text_length = capacity, patch_size, text_length
        self.pad_multiple, self.seed, self.spec, self.carry = pad_multiple, seed, spec, carry

    def cook(self, part: str, sample: RawSample) -> LatentSample:
        """Decode and check a sample.

        Args:
            part: the name of its dataset in a blend; empty without a blend.
            sample: as it is in the shard.

        Raises:
            ValueError: a member is refused, or the sample does not fit the model or the pack; the message names shard
                and key.
        """
        key = sample.__key__
        try:
            stored = StoredSample.decode(key, sample.members)
            latent, text, info = stored.latent, stored.text, stored.info
            if self.spec is not None:
                if latent.shape[0] != self.spec.channels:
                    raise ValueError(f"its latent has {latent.shape[0]} channels; expected {self.spec.channels}")
                if text.shape[1] != self.spec.text_dim:
                    raise ValueError(f"its text embedding is {text.shape[1]} wide; expected {self.spec.text_dim}")
                written = info.get("latent_fingerprint", self.spec.fingerprint)
                if written != self.spec.fingerprint:
                    raise ValueError(f"its latent is of the space {written}; expected {self.spec.fingerprint}")
            if text.shape[0] > self.text_length:
                raise ValueError(
                    f"its text has {text.shape[0]} tokens; the model takes {self.text_length}: "
                    "prepare the data with a shorter --text-length"
                )
            frames, rows, columns = latent_grid(latent, self.patch_size)
            tokens, usable = frames * rows * columns, usable_capacity(self.capacity, self.pad_multiple)
            if tokens > usable:
                raise ValueError(
                    f"its {tokens} tokens do not fit a pack of {usable}: raise the capacity, or prepare the data with "
                    "fewer frames or a smaller size"
                )
        except ValueError as error:
            raise ValueError(f"shard {sample.shard}, sample {key}: {error}") from None
        # Shards of NVIDIA's recipe may hold half precision; all computation here is fp32.
        return LatentSample(
            key,
            sample.__restore_key__,
            latent=latent.float(),
            text=text.float(),
            tokens=tokens,
            name=f"{part}:{key}" if part else key,
        )

    def choose_packs(
        self, samples: Sequence[LatentSample], carried: int
    ) -> tuple[list[list[LatentSample]], list[LatentSample]]:
        """Group a buffer of samples into packs, in random order, because ``full_packs`` sorts them by fill.

        Args:
            samples: a buffer; samples that were carried over come first.
            carried: number of samples that were carried over.

        Returns:
            The groups, and the samples to carry over.
        """
        capacity = usable_capacity(self.capacity, self.pad_multiple)
        packs, rest = full_packs([sample.tokens for sample in samples], capacity, carried)
        # Seeded by the keys of the buffer: this needs no state, and differs between buffers and ranks.
        keys = "\n".join(f"{sample.__key__} {sample.name}" for sample in samples)
        digest = hashlib.sha256(f"{self.seed}\n{keys}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        order = torch.randperm(len(packs), generator=generator).tolist()
        return [[samples[index] for index in packs[number]] for number in order], [samples[index] for index in rest]

    def pack(self, samples: Sequence[LatentSample]) -> PackedSample:
        """Concatenate a group of samples."""
        pack = pack_latents(
            [sample.latent for sample in samples],
            [sample.text for sample in samples],
            [sample.name for sample in samples],
            text_length=self.text_length,
            patch_size=self.patch_size,
            multiple=self.pad_multiple,
        )
        return PackedSample(pack)


def settings_of(encoder: PackEncoder) -> dict[str, Any]:
    """The settings that determine the packs, as plain values, which are compared on resume."""
    values = {name: getattr(encoder, name) for name in ("capacity", "text_length", "pad_multiple", "seed", "carry")}
    return {**values, "patch_size": list(encoder.patch_size)}
