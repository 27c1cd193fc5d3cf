"""Energon's task encoder: decode samples without running code, check them, choose packs, pack.

L text tokens, D text width; a latent is [C, F, H, W].
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.energon import Cooker, SavableDataset, TaskEncoder, WorkerConfig, basic_sample_keys, stateless
from megatron.energon.cache import FileStoreDecoder
from megatron.energon.edataclass import edataclass
from megatron.energon.flavors import CrudeSample
from megatron.energon.flavors.base_dataset import Sample
from megatron.energon.wrappers import PackingDataset
from torch import Tensor

from wan_data.reading.packing import full_packs, usable_capacity
from wan_data.shards.serialization import MEMBERS, RefusedMember, info_from_json, latent_from_pth, text_from_pickle
from wan_model.config import PatchSize
from wan_model.latent_spec import LatentSpec
from wan_model.pack import LatentPack, latent_grid, pack_latents

PART = "part"  # the subflavor that names a sample's dataset in a blend; empty without a blend
_READERS = {"json": info_from_json, "pickle": text_from_pickle, "pth": latent_from_pth}


@edataclass
class LatentSample(Sample):
    """A decoded sample.

    Attributes:
        latent: normalised latent [C, F, H, W].
        text: text embedding [L, D] without padding.
        tokens: number of tokens of the latent.
        name: its key; in a blend, preceded by the name of its dataset.
    """

    latent: Tensor
    text: Tensor
    tokens: int
    name: str


@edataclass
class PackedSample(Sample):
    """A pack of samples."""

    pack: LatentPack


def _location(sample: Mapping[str, Any]) -> str:
    source = sample["__sources__"][0]
    return f"shard {source.dataset_path / source.shard_name}, sample {sample['__key__']}"


class SafeDecoder(FileStoreDecoder):
    """Replaces Energon's decoder, which unpickles members of shards."""

    def decode(self, fname: str, raw: bytes) -> Any:
        """Decode one member; ``raw`` is its bytes."""
        kind = fname.rpartition(".")[2]
        if kind not in _READERS:
            raise RefusedMember(f"{fname} is no member of this format; expected {', '.join(MEMBERS)}")
        try:
            return _READERS[kind](raw)
        except RefusedMember as error:
            raise RefusedMember(f"member {fname} is refused: {error}") from None

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Decode all members of a sample.

        Raises:
            RefusedMember: naming shard, key and member.
        """
        key, decoded = sample["__key__"], {}
        try:
            for name, value in sample.items():
                internal = name.startswith("__")
                decoded[name] = value if internal else self.decode(f"{key.rpartition('/')[2]}.{name}", value)
            if missing := [name for name in MEMBERS if name not in decoded]:
                raise RefusedMember(f"it has no {' and no '.join(missing)}")
        except RefusedMember as error:
            raise RefusedMember(f"{_location(sample)}: {error}") from None
        return decoded

    def config(self) -> dict[str, Any]:
        """The configuration by which Energon distinguishes decoders."""
        return {"decoder": "wan_data"}


class _CarryingPackingDataset(PackingDataset):
    """Energon's packing dataset, with samples that are carried over to the next buffer and saved with its state.

    A saved state holds the names of this class and of ``_carried``; renaming them breaks the resume of older runs.
    """

    _savable_fields = (*PackingDataset._savable_fields, "_carried")

    def __init__(self, *arguments: Any, encoder: "PackEncoder", **more: Any) -> None:
        self._encoder, self._exhausted = encoder, False
        super().__init__(*arguments, pre_packer=self._pre_pack, **more)

    def reset_state_own(self) -> None:
        super().reset_state_own()
        self._carried = 0

    def _fill_reading_buffer(self, source_iter: Iterator[Any], log_progress: bool = False) -> bool:
        del log_progress  # Energon shows a progress bar for every worker's first buffer
        filled = bool(super()._fill_reading_buffer(source_iter, False))
        self._exhausted = not filled
        return filled

    def _pre_pack(self, samples: list[LatentSample]) -> list[list[LatentSample]]:
        # Called when Energon has emptied its reading buffer: samples that are carried over precede those read next.
        may_carry = self._encoder.carry and not self._exhausted
        carried = self._carried if may_carry else len(samples)
        packs, rest = self._encoder.choose_packs(samples, carried)
        for sample in rest:
            self._reading_buffer.append(sample)
        self._carried = len(rest)
        return packs


class PackEncoder(TaskEncoder):
    """Turns the samples of a dataset into ``PackedSample`` batches.

    Args:
        capacity: tokens of a pack, padding included.
        patch_size: latent positions (frames, rows, columns) of a token.
        text_length: tokens that texts are padded to.
        pad_multiple: packs are padded to a multiple of this many tokens.
        seed: of the order of packs.
        spec: the latent space of the dataset, if known.
        carry: carry samples of the emptiest packs over to the next buffer.
    """

    decoder = SafeDecoder()

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
        self.cookers = [Cooker(self.cook)]

    @stateless
    def cook(self, sample: CrudeSample) -> LatentSample:
        """Check a decoded sample.

        Raises:
            ValueError: the sample does not fit the model or the pack; the message names shard and key.
        """
        key = str(sample["__key__"])
        part = (sample["__subflavors__"] or {}).get(PART)
        latent, text, info = sample["pth"], sample["pickle"], sample["json"]
        try:
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
            raise ValueError(f"{_location(sample)}: {error}") from None
        # Shards of NVIDIA's recipe may hold half precision; all computation here is fp32.
        return LatentSample(
            **basic_sample_keys(sample),
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

    @stateless
    def pack_selected_samples(self, samples: Sequence[LatentSample]) -> PackedSample:
        """Concatenate a group of samples."""
        pack = pack_latents(
            [sample.latent for sample in samples],
            [sample.text for sample in samples],
            [sample.name for sample in samples],
            text_length=self.text_length,
            patch_size=self.patch_size,
            multiple=self.pad_multiple,
        )
        return PackedSample(__key__=",".join(pack.keys), __restore_key__=(), pack=pack)

    def build_batch(
        self,
        dataset: SavableDataset,
        *,
        batch_size: int | None,
        batch_drop_last: bool = False,
        packing_buffer_size: int | None = None,
        worker_config: WorkerConfig,
    ) -> SavableDataset:
        """Called by Energon; a batch is one pack."""
        assert batch_size is None
        assert not batch_drop_last
        assert packing_buffer_size is not None
        return _CarryingPackingDataset(
            dataset,
            encoder=self,
            buffer_size=packing_buffer_size,
            final_packer=self.pack_selected_samples,
            final_packer_stateless=True,
            worker_config=worker_config,
        )


def settings_of(encoder: PackEncoder) -> dict[str, Any]:
    """The settings that determine the packs, as plain values, which are compared on resume."""
    values = {name: getattr(encoder, name) for name in ("capacity", "text_length", "pad_multiple", "seed", "carry")}
    return {**values, "patch_size": list(encoder.patch_size)}


assert dataclasses.is_dataclass(LatentSample), "Energon restores samples by their fields"
