"""The ``dataset`` section of the configuration: the loaders of packs for Megatron's loop.

Import only after ``wan_train.engine.start``.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch
from megatron.core import parallel_state
from torch import Tensor

from wan_model import LatentPack, WanConfig
from wan_train import engine
from wan_train.data.mock_data import MockConfig, MockLoader
from wan_train.data.pack_iterator import PackIterator
from wan_train.engine.upstream.loop import DatasetBuildContext, DatasetProvider

if TYPE_CHECKING:  # Energon takes seconds to import, and mock data needs none of it
    from wan_data.reading.loader import PackLoader


@dataclasses.dataclass
class WanDatasetConfig(DatasetProvider):
    """The ``dataset`` section.

    Attributes:
        path: a dataset written by ``wan-data prepare``, or the YAML file of a blend; either may be the URL of one in an
            object store. None with ``mock``.
        encoded_by: the model (folder or hub id) that encoded the data, if the dataset does not record it.
        mock: random latents and text instead of a dataset.
        mock_settings: shapes of the mock data.
        capacity: tokens of a pack, including padding.
        packing_buffer, shuffle_buffer: see ``wan_data.reading.loader.LoaderConfig``.
        seed: of the order and of mock data.
        cache_gb: of a dataset in a store, so many gigabytes are kept on a local disk of each machine for later epochs;
            0 for none.
        dataloader_save: set by the run to the checkpoint folder; the loader's state is part of the checkpoint.
    """

    dataloader_type: str = "external"
    num_workers: int = 0
    path: str | None = None
    encoded_by: str | None = None
    mock: bool = False
    mock_settings: MockConfig = dataclasses.field(default_factory=MockConfig)
    capacity: int = 32760
    packing_buffer: int = 64
    shuffle_buffer: int = 0
    seed: int = 1234
    cache_gb: float = 0.0
    dataloader_save: str | None = None

    def configure(self, model: WanConfig, pad_multiple: int) -> None:
        """Set what the loader needs of the model and the layout."""
        self._model, self.pad_multiple = model, pad_multiple

    def loader(self, rank: int, ranks: int) -> Union["PackLoader", MockLoader]:
        """The loader of one data-parallel rank."""
        if self.mock:
            return MockLoader(
                self.mock_settings, self._model, rank=rank, ranks=ranks, multiple=self.pad_multiple, seed=self.seed
            )
        return self._open("train", self.pad_multiple, self.packing_buffer, self.num_workers, rank, ranks)

    def _open(self, split: str, multiple: int, buffer: int, workers: int, rank: int, ranks: int) -> "PackLoader":
        from wan_data.reading.loader import LoaderConfig, PackLoader

        assert self.path is not None, "checked in configure_data"
        config = LoaderConfig(
            path=self.path,
            split=split,
            capacity=self.capacity,
            text_length=self._model.text_length,
            patch_size=self._model.patch_size,
            pad_multiple=multiple,
            packing_buffer=buffer,
            shuffle_buffer=self.shuffle_buffer,
            num_workers=workers,
            seed=self.seed,
            cache_bytes=int(self.cache_gb * 1e9),
        )
        with failing_store_named():
            return PackLoader(config, rank=rank, world_size=ranks)

    def validation_packs(self) -> Iterator[LatentPack]:
        """The validation split in order, one sample per pack, equal on every rank; infinite for mock data.

        Raises:
            ValueError: the dataset has no validation split.
        """
        if self.mock:
            one_each = dataclasses.replace(self.mock_settings, number_packed_samples=1)
            for number, shape in enumerate(itertools.cycle(self.mock_settings.shapes)):
                settings = dataclasses.replace(one_each, shapes=[shape])
                loader = MockLoader(
                    settings, self._model, rank=0, ranks=1, multiple=1, seed=self.seed, purpose="held out"
                )
                loader.drawn = number
                yield next(iter(loader))
        yield from self._open("val", 1, 1, 0, 0, 1)

    def validation_captions(self) -> Iterator[tuple[str, str]]:
        """Key and caption of each sample of the validation split, in the order of ``validation_packs``.

        Raises:
            ValueError: a sample is damaged.
        """
        if self.mock:
            return
        from wan_data.reading.captions import captions_of

        assert self.path is not None, "checked in configure_data"
        with failing_store_named():
            yield from captions_of(self.path, "val")

    def close(self) -> None:
        """End the drawing of packs, in whichever way the run ends."""
        if (packs := getattr(self, "train_iterator", None)) is not None:
            packs.close()

    def build_datasets(self, context: DatasetBuildContext) -> tuple[PackIterator, None, None]:
        """Called by Megatron-Bridge on every rank."""
        del context
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        device = engine.start().device
        pin = device if device.type == "cuda" else None
        content = None
        if self.path is not None:
            from wan_data.reading.fingerprint import digest_without_manifest

            with failing_store_named():
                content = digest_without_manifest(self.path)
        self.train_iterator = PackIterator(self.loader(rank, ranks), rank, ranks, pin, content=content)
        return self.train_iterator, None, None


@contextlib.contextmanager
def failing_store_named() -> Iterator[None]:
    """Raise as a ``ValueError`` that a store fails while a dataset in it is opened; it is no error of this program."""
    try:
        yield
    except OSError as error:
        from wan_data.storage.failures import StoreUnavailableError

        if not isinstance(error, StoreUnavailableError):
            raise
        raise ValueError(f"{error.filename}: {error.strerror}") from error


def require_dataset(path: str) -> None:
    """Refuse a path at which there is nothing; of what is in a store that is found when it is opened.

    Raises:
        ValueError: there is nothing, or it is a URL of another kind.
    """
    from wan_data.storage.location import location

    found = location(path)
    if isinstance(found, Path) and not found.exists():
        raise ValueError(f"dataset.path is {path}, which does not exist; make one with wan-data prepare")


def read_dataset_spec(path: str, encoded_by: str | None) -> dict[str, Any]:
    """The latent space of a dataset, as plain values."""
    from wan_data.reading.datasets import read_latent_spec

    with failing_store_named():
        return read_latent_spec(path, encoded_by=encoded_by).to_dict()


def empty_caption_of(config: Any) -> Tensor:
    """Embedding of the empty caption, [L, D], which replaces dropped captions.

    Raises:
        ValueError: the dataset has no embedding of the empty caption.
    """
    if config.dataset.mock:
        return torch.zeros(1, config.model.wan_config.text_dim)
    from wan_data.reading.empty_caption import read_empty_caption

    with failing_store_named():
        return read_empty_caption(config.dataset.path)
