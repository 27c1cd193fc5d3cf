"""The workers of this process: decoder processes that it starts, and encoding in it or in processes that it starts."""

import collections
import contextlib
import itertools
import threading
from collections.abc import Iterable, Iterator

from jaxtyping import Float
from torch import Tensor

from wan_data.prepare.encoding.encoder import TextEmbeddings, choose_device, load_codec
from wan_data.prepare.encoding.encoder_pool import EncoderPool
from wan_data.prepare.encoding.fetching import fetched_ahead
from wan_data.prepare.encoding.preload import preload_encoders
from wan_data.prepare.probing.pool import KnownSource, probe_sources
from wan_data.prepare.shard_batches import EncodeTask, ShardPlan, encode_tasks
from wan_data.prepare.shard_writing import write_shard
from wan_data.prepare.workers import ProbedSources, Work, WrittenShards
from wan_data.storage.local_copies import LocalCopies
from wan_model.codec.latent_codec import LatentCodec, import_autoencoder
from wan_model.system.torchrun import processors


class LocalWorkers:
    """See ``Workers``; they end with each call.

    Args:
        work: what is to be done.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        processes: number of encoding processes; 1 encodes in this one.
        decoders: number of decoder processes that probe; one per core if None.
        local_rank: rank of this process on its machine; it determines the devices.
        copies: of clips in a store.
    """

    def __init__(
        self,
        work: Work,
        device: str,
        processes: int,
        decoders: int | None,
        local_rank: int = 0,
        *,
        copies: LocalCopies,
    ) -> None:
        self._copies = copies
        if processes < 1:
            raise ValueError(f"{processes} processes cannot encode; it must be at least 1")
        self._work, self._device, self._processes, self._local_rank = work, device, processes, local_rank
        self._decoders = decoders or processors()
        self._codec: LatentCodec | None = None
        self._importing: threading.Thread | None = None

    def __enter__(self) -> "LocalWorkers":
        """Nothing is started."""
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for an import, which nothing interrupts."""
        if self._importing is not None:
            self._importing.join()

    def warm_up(self) -> None:
        """See ``Workers``."""
        if self._processes > 1:
            preload_encoders()
        elif self._importing is None:
            self._importing = threading.Thread(target=_import_autoencoder, name="imports the autoencoder")
            self._importing.start()

    def probe(self, sources: Iterable[KnownSource]) -> ProbedSources:
        """See ``Workers``."""
        return probe_sources(sources, self._work.folder.settings, decoders=self._decoders, copies=self._copies)

    def write_shards(self, plans: Iterable[ShardPlan], samples: int) -> WrittenShards:
        """See ``Workers``."""
        work, settings = self._work, self._work.folder.settings
        pending: collections.deque[tuple[ShardPlan, int]] = collections.deque()

        def tasks() -> Iterator[EncodeTask]:
            for plan in plans:
                of_shard = encode_tasks(plan, settings.batch_size)
                pending.append((plan, len(of_shard)))
                yield from fetched_ahead(of_shard, self._copies)

        with EncoderPool(
            work.model, settings, self._device, self._processes, self._local_rank, copies=self._copies
        ) as pool:
            codec = self._load_codec()
            text = TextEmbeddings(codec)
            work.report.stage("encoding", samples)
            encoded = pool.encode(tasks(), codec)
            for first in encoded:
                plan, count = pending.popleft()
                results = itertools.islice(itertools.chain([first], encoded), count)
                windows = (one for _, of_task in results for one in of_task)
                yield plan, write_shard(work.folder, plan, windows, text.get, work.report.step)

    def empty_caption(self) -> Float[Tensor, "L D"]:
        """See ``Workers``."""
        (text,) = self._load_codec().encode_text([""])
        return text.cpu()

    def _load_codec(self) -> LatentCodec:
        """The codec of the model, which is loaded once."""
        if self._codec is None:
            if self._importing is not None:
                self._importing.join()
            self._work.report.log(f"loading {self._work.model}")
            device = choose_device(self._device, self._local_rank)
            self._codec = load_codec(
                self._work.model, self._work.folder.settings, device, vae=self._processes == 1, text=True
            )
        return self._codec


def _import_autoencoder() -> None:
    with contextlib.suppress(Exception):  # it is raised again where the autoencoder is loaded
        import_autoencoder()
