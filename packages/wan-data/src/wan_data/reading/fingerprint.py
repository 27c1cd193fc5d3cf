"""What identifies a dataset, so that the state of a loader is not continued on another one.

The fingerprint of a part is of its shards' names, numbers of samples and sizes, and of their digests in its manifest.
Shards without a manifest, such as those of NVIDIA's script, may be equal in all but their content; for these there is a
digest of samples of their bytes, which is saved separately and is not compared if a state has none.
"""

import hashlib
import json
import os

from wan_data.index.manifest import MANIFEST_NAME, Manifest
from wan_data.reading.blends import Part, parts_of
from wan_data.storage.files import failures_named, is_there
from wan_data.storage.location import Location, StorePath
from wan_data.storage.store import read

# Of data without digests: shards that are looked into, and bytes that are read in each of two places.
_SHARDS, _BYTES = 64, 1 << 15


def fingerprint_of(part: Part, manifest: Manifest | None) -> str:
    """Identifies the order of a part's samples, and their content if it has a manifest."""
    hashes = {shard.name: shard.sha256 for shard in manifest.shards} if manifest else {}
    counts, sizes = part.metadata.counts, part.metadata.sizes
    # As json.dumps would write [{name: [count, bytes, digest], ...}, names, weight], but a shard at a time.
    digest, comma = hashlib.sha256(b"[{"), ""
    for name in sorted(counts):
        row = json.dumps([counts[name], sizes[name], hashes.get(name, "")])
        digest.update(f"{comma}{json.dumps(name)}: {row}".encode())
        comma = ", "
    digest.update(f"}}, {json.dumps(part.metadata.splits[part.split])}, {json.dumps(part.weight)}]".encode())
    return digest.hexdigest()[:16]


def digest_without_manifest(path: str | os.PathLike[str] | StorePath) -> str | None:
    """A digest of bytes of the shards that no manifest has digests of, in the train split of a dataset or blend.

    Returns:
        None if there are none.

    Raises:
        ValueError: the path is no dataset, or its metadata could run code.
    """
    folders = {part.folder: part.metadata for part in parts_of(path).get("train", ())}
    bare = [(folder, metadata.sizes) for folder, metadata in folders.items() if not is_there(folder / MANIFEST_NAME)]
    shards = [(folder / name, sizes[name]) for folder, sizes in bare for name in sorted(sizes)]
    digest = hashlib.sha256()
    for shard, size in shards[:: -(-len(shards) // _SHARDS) or 1]:
        for start in (0, size // 2):
            digest.update(_bytes_of(shard, start))
    return digest.hexdigest()[:16] if shards else None


def _bytes_of(shard: Location, start: int) -> bytes:
    if isinstance(shard, StorePath):
        with failures_named(shard):
            return read(shard, start, _BYTES)
    with shard.open("rb") as file:
        file.seek(start)
        return file.read(_BYTES)
