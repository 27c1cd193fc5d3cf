"""What each actor does; a stage of the preparation is the actors of one class.

Arrays travel between actors through Ray's object store, small results to the command itself.
"""

import dataclasses
import errno
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from wan_data import __version__
from wan_data.prepare.encoding.encoder import (
    EncodedWindow,
    TextEmbeddings,
    choose_device,
    encode_windows,
    load_codec,
)
from wan_data.prepare.encoding.fetching import TaskFetcher
from wan_data.prepare.encoding.task_decoder import FrameBatch, Problems, TaskDecoder, WindowKey
from wan_data.prepare.probing.cache import Found
from wan_data.prepare.probing.source_probe import Probed, SourceProbe
from wan_data.prepare.results import FinishedShard
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.shard_batches import EncodeTask, ShardPlan
from wan_data.prepare.shard_writing import ShardFolder, write_shard
from wan_data.sources.source import SourceFile
from wan_data.storage.local_copies import LocalCopies
from wan_data.video.decoder_process import Decoder
from wan_model.codec.latent_codec import LatentCodec

# A writer whose command was killed may still hold its file for this long.
_EARLIER_WRITER_SECONDS = 30.0


class StageActor:
    """Base of the actors: what makes one ready for its first call.

    Args:
        visible: paths that the node of the actor must see.
    """

    def __init__(self, visible: Sequence[Path]) -> None:
        self._visible = visible

    def start(self) -> tuple[str, str]:
        """Check the node, and load what the calls need.

        Returns:
            The name of the node, and its version of wan-data.

        Raises:
            ValueError: the node does not see a path.
        """
        node = socket.gethostname()
        for path in self._visible:
            if not path.exists():
                raise ValueError(
                    f"the node {node} does not see {path}; clips, model and output folder must be on a file system "
                    "that all nodes of the Ray cluster share"
                )
        self._load()
        return node, __version__

    def _load(self) -> None:
        """Load what the calls need."""

    def end(self) -> None:
        """Delete what this actor has on the disk of its node, and is of no use without it."""


@dataclasses.dataclass(frozen=True)
class Copies:
    """The local copies of the actors of a stage.

    Attributes:
        most: bytes, see ``LocalCopies``.
        actors: among which they are divided.
    """

    most: int | None
    actors: int

    def make(self) -> LocalCopies:
        """Those of one actor."""
        return LocalCopies(self.most, share=self.actors)


class ProbeActor(StageActor):
    """Probes sources with a decoder process of its own.

    Args:
        visible: see ``StageActor``.
        settings: of the preparation.
        copies: of clips in a store.
    """

    def __init__(self, visible: Sequence[Path], settings: PrepareSettings, copies: Copies) -> None:
        super().__init__(visible)
        self._copies = copies.make()
        self._probe = SourceProbe(settings, self._copies)
        self._decoder = Decoder(program=self._probe.program)

    def probe(self, source: SourceFile, known: Found | None) -> Probed:
        """See ``SourceProbe.probe``."""
        return self._probe.probe(source, known, self._decoder)

    def end(self) -> None:
        """See ``StageActor``."""
        self._copies.__exit__()


class DecodeActor(StageActor):
    """Decodes one task after another with a decoder process of its own, a batch at a call.

    Args:
        visible: see ``StageActor``.
        settings: of the preparation.
        copies: of clips in a store.
    """

    def __init__(self, visible: Sequence[Path], settings: PrepareSettings, copies: Copies) -> None:
        super().__init__(visible)
        self._settings, self._decoder = settings, Decoder()
        self._copies = copies.make()
        self._fetcher, self._fetched = TaskFetcher(self._copies), EncodeTask(-1, ())
        self._batches: Iterator[FrameBatch | Problems] = iter(())
        self._complete = True

    def _load(self) -> None:
        self._decoder.start()

    def decode(self, task: EncodeTask | None) -> tuple[tuple[WindowKey, ...] | Problems, list[np.ndarray] | None]:
        """Decode the next batch.

        Args:
            task: begins with this task, also if an earlier one is not finished; None goes on.

        Returns:
            The keys of the windows and their frames; after the last batch the problems, and None.
        """
        if task is not None:
            if not self._complete:  # the rest is not wanted any more
                self._decoder.__exit__()
                self._decoder = Decoder()
            self._fetcher.end(self._fetched)
            fetched = self._fetcher.begin(task)
            assert fetched is not None, "it has waited for the clips"
            self._fetched, decoder = fetched, TaskDecoder(self._settings, self._decoder)
            decoder.submit(fetched)
            self._batches, self._complete = decoder.batches(fetched), False
        found = next(self._batches)
        self._complete = not isinstance(found, FrameBatch)
        if isinstance(found, FrameBatch):
            return found.keys, [frames.numpy() for frames in found.frames]
        return found, None

    def end(self) -> None:
        """See ``StageActor``."""
        self._copies.__exit__()


class _CodecActor(StageActor):
    """Base of the actors with a part of the model.

    Args:
        visible: see ``StageActor``.
        model: folder or hub id.
        settings: of the preparation.
        device: ``cpu`` or ``cuda``.
        threads: of torch on the CPU.
    """

    def __init__(
        self, visible: Sequence[Path], model: str, settings: PrepareSettings, device: str, threads: int
    ) -> None:
        super().__init__(visible)
        self._model, self._settings, self._device, self._threads = model, settings, device, threads
        self._codec: LatentCodec

    def _load_part(self, *, vae: bool, text: bool) -> LatentCodec:
        torch.set_num_threads(self._threads)
        return load_codec(self._model, self._settings, choose_device(self._device), vae=vae, text=text)


class EncodeActor(_CodecActor):
    """Encodes batches of frames with an autoencoder of its own."""

    def _load(self) -> None:
        self._codec = self._load_part(vae=True, text=False)

    def encode(
        self, keys: tuple[WindowKey, ...], frames: list[np.ndarray]
    ) -> tuple[list[str | None], list[np.ndarray | None]]:
        """Encode a batch.

        Args:
            keys: of the windows.
            frames: [T, H, W, 3] of each window, uint8.

        Returns:
            Why a window has no latent, if so; and the latents [C, F, h, w].
        """
        # Copied: what lies in the object store cannot be written to, which tensors are expected to allow.
        batch = FrameBatch(keys, tuple(torch.from_numpy(one.copy()) for one in frames))
        encoded = encode_windows(self._codec, batch)
        return [one.problem for one in encoded], [None if one.latent is None else one.latent.numpy() for one in encoded]


Embedding = tuple[np.ndarray, int]


class TextActor(_CodecActor):
    """Encodes captions with a text encoder of its own."""

    def _load(self) -> None:
        self._codec = self._load_part(vae=False, text=True)
        self._embeddings = TextEmbeddings(self._codec)

    def encode(self, captions: Sequence[str]) -> tuple[None, list[Embedding]]:
        """Nothing, and of each caption the embedding [L, D] with the tokens of the whole caption."""
        found = [self._embeddings.get(caption) for caption in captions]
        return None, [(embedding.numpy(), tokens) for embedding, tokens in found]

    def empty_caption(self) -> np.ndarray:
        """The embedding [L, D] of the empty caption."""
        (text,) = self._codec.encode_text([""])
        return text.cpu().numpy()


@dataclasses.dataclass(frozen=True)
class LostPieces:
    """What a shard was to be written from and has gone with the node that it was on.

    Attributes:
        numbers: of the pieces; -1 stands for the texts.
    """

    numbers: tuple[int, ...]


class WriteActor(StageActor):
    """Writes shards.

    Args:
        visible: see ``StageActor``.
        folder: of the dataset, an absolute path.
    """

    def __init__(self, visible: Sequence[Path], folder: ShardFolder) -> None:
        super().__init__(visible)
        self._folder = folder

    def write(
        self,
        plan: ShardPlan,
        captions: Sequence[str],
        texts: list[Any],
        pieces: Sequence[tuple[tuple[WindowKey, ...], Any]],
        problems: Problems,
    ) -> FinishedShard | LostPieces:
        """Write a shard.

        Args:
            plan: of the shard.
            captions: its captions, each once.
            texts: the reference of their embeddings, in a list, so that it is fetched here.
            pieces: keys of windows with the reference of their latents, in the order in which they are needed.
            problems: why other windows have none.

        Returns:
            The record of the shard; or what cannot be fetched any more.
        """
        until = time.monotonic() + _EARLIER_WRITER_SECONDS
        while True:
            try:
                embedding_of = _embeddings(captions, ray.get(texts[0]))
                return write_shard(self._folder, plan, _windows(pieces, problems), embedding_of, _say_nothing)
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > until:
                    raise
                time.sleep(0.5)
            except ray.exceptions.RayError:
                return LostPieces(_lost([texts[0], *(latents for _, latents in pieces)]))


def _windows(pieces: Iterable[tuple[tuple[WindowKey, ...], Any]], problems: Problems) -> Iterator[EncodedWindow]:
    for key, problem in problems.items():
        yield EncodedWindow(*key, None, problem)
    for keys, reference in pieces:
        for key, latent in zip(keys, ray.get(reference), strict=True):
            if key not in problems:
                yield EncodedWindow(*key, torch.from_numpy(latent.copy()))


def _embeddings(captions: Sequence[str], embeddings: Sequence[Embedding]) -> Callable[[str], tuple[torch.Tensor, int]]:
    by_caption = dict(zip(captions, embeddings, strict=True))

    def embedding_of(caption: str) -> tuple[torch.Tensor, int]:
        array, tokens = by_caption[caption]
        return torch.from_numpy(array.copy()), tokens

    return embedding_of


def _say_nothing(line: str) -> None:
    """The command says it, in the order of the windows."""


def _lost(references: Sequence[Any]) -> tuple[int, ...]:
    lost = []
    for number, reference in enumerate(references):
        try:
            ray.get(reference)
        except ray.exceptions.RayError:
            lost.append(number - 1)
    return tuple(lost)
