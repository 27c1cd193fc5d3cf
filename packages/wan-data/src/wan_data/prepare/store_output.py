"""A dataset in a store: it is made in a local folder, which has everything but the contents of shards.

A finished shard is uploaded, and its headers alone stay, of which the index is made. The manifest is written last, as
in a folder, so that a reader sees the dataset as it was or as it is. Nothing in a store can be locked: whether another
preparation has changed the dataset is seen before each shard, and before the manifest, is written.
"""

import collections
import contextlib
import dataclasses
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path

from wan_data.index.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, read_manifest
from wan_data.index.records import is_part_name
from wan_data.prepare.outputs import Output, WrittenShards
from wan_data.prepare.ranks import Ranks
from wan_data.prepare.removal import check_shard
from wan_data.prepare.results import FinishedShard
from wan_data.prepare.shard_batches import ShardPlan
from wan_data.prepare.work_files import WorkRecord
from wan_data.prepare.writer_claim import CLAIM_NAME, WriterClaim, claimed_by
from wan_data.reading.empty_caption import EMPTY_CAPTION_NAME
from wan_data.shards.energon_index import OFFSETS_SUFFIX, write_offsets
from wan_data.shards.energon_metadata import META_FOLDER, write_metadata
from wan_data.shards.lock import writer_lock
from wan_data.shards.tar_headers import tar_members
from wan_data.shards.writer import SHARD_GLOB, ShardRecord, is_shard_name
from wan_data.sources.modification_times import TIMES_NAME
from wan_data.storage.background import Background
from wan_data.storage.location import Location, StorePath
from wan_data.storage.store import StoredObject, delete, download, list_objects, look, upload
from wan_model.system.files import atomic_write

_STATE_NAME, _DATASET_NAME, _TOKEN_NAME = "published.json", "dataset", "shared"
_COMPARED = {".info.json", ".info.yaml", "split.yaml"}
# Shards that are uploaded at a time, while the next ones are encoded.
_UPLOADS = 2


def output_at(place: Location, work_folder: Path | None = None) -> Output:
    """The output of a preparation.

    Args:
        place: folder of the dataset, or its URL in a store.
        work_folder: in which the local folder of a dataset in a store is made; in the user's cache folder if None.
    """
    return StoreOutput(place, work_folder) if isinstance(place, StorePath) else Output(place, str(place))


@dataclasses.dataclass(frozen=True)
class _State(WorkRecord):
    """What the local folder is of.

    Attributes:
        manifest: SHA-256 of the manifest in the store; None if it has none.
        bytes, mtime_ns: of that object.
        token: by which the preparations of this folder claim the dataset; see ``WriterClaim``.
        claim: the claim that the last of them found.
        uploaded: size and time in ns of the local file that each other object was made of, by name.
    """

    manifest: str | None = None
    bytes: int = 0
    mtime_ns: int = 0
    token: str = ""
    claim: str | None = None
    uploaded: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def of(self, manifest: str, found: StoredObject, uploaded: Mapping[str, tuple[int, int]]) -> "_State":
        """The same with another manifest, its object, and other objects."""
        return _State(manifest, found.bytes, found.mtime_ns, self.token, self.claim, uploaded)


class StoreOutput(Output):
    """See ``Output``; the first rank alone uploads what is not of a shard.

    Args:
        url: of the dataset.
        work_folder: see ``output_at``.
    """

    def __init__(self, url: StorePath, work_folder: Path | None = None) -> None:
        parent = work_folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wan-data"
        self._root = parent / f"output-{hashlib.sha256(str(url).encode()).hexdigest()[:16]}"
        super().__init__(self._root / _DATASET_NAME, str(url))
        self._url, self._state = url, _State()

    # -- the local folder ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def opened(self, ranks: Ranks) -> Iterator[None]:
        """See ``Output``.

        Raises:
            ValueError: another process uses the local folder, the ranks do not share it, or the dataset is of an
                earlier format, or the folder of the store holds objects of another program.
            OSError: the store fails.
        """
        if ranks.rank == 0:
            self._root.mkdir(parents=True, exist_ok=True)
        with writer_lock(self._root, str(self._url)) if ranks.rank == 0 else contextlib.nullcontext():
            self._check_shared(ranks)
            if ranks.rank == 0:
                self._follow()
            ranks.barrier("output")
            if ranks.rank:
                self._state = _State.read(self._root / _STATE_NAME)
            yield

    def _check_shared(self, ranks: Ranks) -> None:
        if ranks.world_size == 1:
            return
        token = self._root / _TOKEN_NAME
        if ranks.rank == 0:
            token.write_text(secrets.token_hex(8))
        ranks.barrier("token")
        if not token.is_file():
            raise ValueError(
                f"rank {ranks.rank} does not see {self._root} of rank 0; with an output in a store, --work-folder must "
                "be on a file system that all ranks share"
            )

    def _follow(self) -> None:
        """Make the local folder that of the dataset in the store, unless it is."""
        now, claim = self._manifest_object(), claimed_by(self._url)
        path = self._root / _STATE_NAME
        try:
            self._state = _State.read(path)
            # Who else has claimed the dataset may have replaced shards that this folder has finished.
            known = self._seen() == now and claim in (None, self._state.token) and self._is_whole()
        except (FileNotFoundError, ValueError):
            known = False
        if known:
            self._save(dataclasses.replace(self._state, claim=claim))
            if (self.folder / MANIFEST_NAME).is_file():
                manifest = read_manifest(self.folder, allow_incomplete=True)
                if manifest.complete:
                    self.commit(manifest)  # an interrupted run has written it here alone
            return
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self._state = _State(token=secrets.token_hex(16), claim=claim)
        if now is None:
            self._check_ours()
            self.folder.mkdir()
        else:
            self._fetch(now)
        self._state.write(path)

    def _is_whole(self) -> bool:
        """Whether the local folder has the files that it needs; what it lacks, the store has."""
        manifest_path = self.folder / MANIFEST_NAME
        if not manifest_path.is_file():
            return self._state.manifest is None
        parts = read_manifest(self.folder, allow_incomplete=True).index.parts
        return all((self.folder / part.name).is_file() for part in parts)

    def _check_ours(self) -> None:
        for found in list_objects(self._url):
            name = found.path.relative_to(self._url)
            plain = name.removesuffix(OFFSETS_SUFFIX)
            ours = is_shard_name(plain) or is_part_name(name) or name in (EMPTY_CAPTION_NAME, TIMES_NAME, CLAIM_NAME)
            if not ours and not name.startswith(f"{META_FOLDER}/"):
                raise ValueError(
                    f"{self._url} holds {name}, which wan-data did not write; choose an empty or a new folder"
                )

    def _fetch(self, manifest: StoredObject) -> None:
        """Download everything but the shards, the manifest last."""
        with tempfile.TemporaryDirectory(dir=self._root) as folder:
            path = Path(folder) / MANIFEST_NAME
            download(manifest, path)
            try:
                found = read_manifest(path.parent)
            except ValueError as error:
                raise ValueError(str(error).replace(str(path.parent), str(self._url))) from None
            if found.format_version != FORMAT_VERSION:
                raise ValueError(
                    f"{self._url} is a dataset of format {found.format_version}; copy it to a disk, run wan-data "
                    "upgrade there, and copy it back"
                )
            names = [part.name for part in found.index.parts]
            names += [EMPTY_CAPTION_NAME] if found.empty_caption is not None else []
            (self.folder / META_FOLDER).mkdir(parents=True)
            objects = [look(self._url / name) for name in names]
            with contextlib.suppress(FileNotFoundError):  # it only saves time
                objects.append(look(self._url / TIMES_NAME))
            objects += [one for one in list_objects(self._url / META_FOLDER) if one.path.parent.name == META_FOLDER]
            uploaded = {}
            for one in objects:
                name = one.path.relative_to(self._url)
                download(one, self.folder / name)
                uploaded[name] = _stamp(self.folder / name)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            path.replace(self.folder / MANIFEST_NAME)
        self._state = self._state.of(digest, manifest, uploaded)

    # -- shards --------------------------------------------------------------------------------------------------------

    def shards_written(self, written: WrittenShards) -> WrittenShards:
        """See ``Output``."""
        waiting: collections.deque[tuple[ShardPlan, FinishedShard, Future[None]]] = collections.deque()
        pool = Background(_UPLOADS, "uploads")

        def first() -> tuple[ShardPlan, FinishedShard]:
            plan, shard, done = waiting.popleft()
            done.result()
            return plan, shard

        with contextlib.closing(written):
            try:
                for plan, shard in written:
                    waiting.append((plan, shard, pool.submit(self._upload_shard, shard.record)))
                    while waiting and (waiting[0][2].done() or len(waiting) > _UPLOADS):
                        yield first()
                while waiting:
                    yield first()
            finally:
                for *_, done in waiting:
                    done.cancel()
                pool.end()

    def shard_written(self, shard: ShardRecord) -> None:
        """See ``Output``."""
        self._upload_shard(shard)

    def _upload_shard(self, shard: ShardRecord | None) -> None:
        if shard is None:
            return
        self._check_unchanged()
        path, offsets = self.folder / shard.name, self.folder / (shard.name + OFFSETS_SUFFIX)
        write_offsets(self.folder, shard)
        for file in (path, offsets):
            upload(file, self._url / file.name)
        _leave_headers(path)

    def check_shard(self, shard: ShardRecord) -> None:
        """See ``Output``; the size is compared, and the content when the shard is written again."""
        path = self._url / shard.name
        try:
            size = look(path).bytes
        except FileNotFoundError:
            size = -1
        if size != shard.bytes:
            raise ValueError(
                f"{path} is missing or damaged, so that its samples cannot be kept: restore it and run the same "
                "command again, or pass --overwrite to encode everything again"
            )

    @contextlib.contextmanager
    def shard_here(self, shard: ShardRecord) -> Iterator[None]:
        """See ``Output``."""
        path = self.folder / shard.name
        download(look(self._url / shard.name), path)
        try:
            check_shard(self.folder, shard)
            yield
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), str(self._url / shard.name))) from None
        finally:
            path.unlink(missing_ok=True)

    # -- the rest ------------------------------------------------------------------------------------------------------

    def write_metadata(self, shards: Iterable[ShardRecord], before: Iterable[ShardRecord]) -> None:
        """See ``Output``."""
        write_metadata(self.folder, tuple(shards), tuple(before), elsewhere=True)

    def restore_metadata(self, manifest: Manifest) -> bool:
        """The metadata in the store is that of the local folder."""
        del manifest
        return False

    def cleared(self) -> None:
        """See ``Output``; without its manifest nobody takes the rest for a dataset."""
        self._check_unchanged()
        delete([self._url / MANIFEST_NAME])
        self._save(_State(token=self._state.token, claim=self._state.claim))
        delete([self._url / name for name in self._names() if _is_replaceable(name)])

    def commit(self, manifest: Manifest) -> None:
        """See ``Output``."""
        path = self.folder / MANIFEST_NAME
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        new = digest != self._state.manifest
        if new:
            self._check_unchanged()
        names = [part.name for part in manifest.index.parts]
        names += [EMPTY_CAPTION_NAME] if manifest.empty_caption is not None else []
        names += [TIMES_NAME] if (self.folder / TIMES_NAME).is_file() else []
        # Last what a reader compares, all small, so that it hardly finds one of them without the others.
        metadata = sorted((self.folder / META_FOLDER).iterdir(), key=lambda file: (file.name in _COMPARED, file.name))
        names += [f"{META_FOLDER}/{file.name}" for file in metadata]
        uploaded = dict(self._state.uploaded)
        for name in names:
            if uploaded.get(name) != (stamp := _stamp(self.folder / name)):
                upload(self.folder / name, self._url / name)
                uploaded[name] = stamp
        uploaded = {name: uploaded[name] for name in names}
        if new:
            self._check_unchanged()
            upload(path, self._url / MANIFEST_NAME)
            found = self._manifest_object()
            assert found is not None, "it was uploaded"
            self._save(self._state.of(digest, found, uploaded))
            listed = {shard.name for shard in manifest.shards} | {part.name for part in manifest.index.parts}
            old = [name for name in self._names() if name.removesuffix(OFFSETS_SUFFIX) not in listed]
            delete([self._url / name for name in old if _is_numbered(name)])
            self._claim().release()
        elif uploaded != self._state.uploaded:
            self._save(dataclasses.replace(self._state, uploaded=uploaded))
        for file in (*self.folder.glob(SHARD_GLOB), *self.folder.glob(SHARD_GLOB + OFFSETS_SUFFIX)):
            file.unlink()

    def _names(self) -> Iterator[str]:
        return (found.path.relative_to(self._url) for found in list_objects(self._url))

    def _save(self, state: _State) -> None:
        state.write(self._root / _STATE_NAME)
        self._state = state

    def _manifest_object(self) -> StoredObject | None:
        try:
            return look(self._url / MANIFEST_NAME)
        except FileNotFoundError:
            return None

    def _seen(self) -> StoredObject | None:
        """The manifest that the local folder is of."""
        if self._state.manifest is None:
            return None
        return StoredObject(self._url / MANIFEST_NAME, self._state.bytes, self._state.mtime_ns)

    def _claim(self) -> WriterClaim:
        return WriterClaim(self._url, self._state.token, self._state.claim)

    def _check_unchanged(self) -> None:
        self._state = _State.read(self._root / _STATE_NAME)  # the first rank may have written another manifest
        if not self._claim().hold() or self._manifest_object() != self._seen():
            raise ValueError(
                f"{self._url} was changed by another preparation meanwhile; run the same command again when that has "
                "ended: it begins with what is there then"
            )


def _is_numbered(name: str) -> bool:
    return is_shard_name(name.removesuffix(OFFSETS_SUFFIX)) or is_part_name(name)


def _is_replaceable(name: str) -> bool:
    return _is_numbered(name) or name in (EMPTY_CAPTION_NAME, TIMES_NAME) or name.startswith(f"{META_FOLDER}/")


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _leave_headers(path: Path) -> None:
    """Turn a shard into a file of the same size that has its headers alone, and holes for the contents."""
    with path.open("rb") as file, atomic_write(path) as target:
        size = os.fstat(file.fileno()).st_size
        for member in tar_members(file):
            file.seek(member.offset)
            header = file.read(member.content - member.offset)
            target.seek(member.offset)
            target.write(header)
        target.truncate(size)
