"""Reading the samples of a shard sequentially, without running code from it."""

import dataclasses
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from wan_data.shards.serialization import (
    LARGEST_MEMBER,
    MEMBERS,
    RefusedMember,
    info_from_json,
    latent_from_pth,
    text_from_pickle,
)


@dataclasses.dataclass(frozen=True)
class StoredSample:
    """A sample as it is stored in a shard.

    Attributes:
        key: its key.
        latent: [C, F, H, W].
        text: [L, D].
        info: the json member.
    """

    key: str
    latent: Tensor
    text: Tensor
    info: dict[str, Any]


def samples_of(shard: Path) -> Iterator[StoredSample]:
    """The samples of a shard, in order.

    Raises:
        ValueError: the file is no complete tar file, or a sample is invalid; the message names shard and key.
    """
    for key, members in members_of(shard):
        try:
            if missing := [name for name in MEMBERS if name not in members]:
                raise RefusedMember(f"it has no {' and no '.join(missing)} member")
            yield StoredSample(
                key,
                latent_from_pth(members["pth"]),
                text_from_pickle(members["pickle"]),
                info_from_json(members["json"]),
            )
        except RefusedMember as error:
            raise RefusedMember(f"shard {shard.name}, sample {key}: {error}") from None


def members_of(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key of each sample and the content of its members, in order; the members of a sample are adjacent.

    Raises:
        ValueError: the file is no complete tar file, or has a member that is too large.
    """
    key, members = "", dict[str, bytes]()
    seen: set[str] = set()
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                name, _, kind = member.name.partition(".")
                if not member.isfile():
                    continue
                if member.size > LARGEST_MEMBER:
                    raise RefusedMember(f"{shard}: {member.name} has {member.size} bytes; at most {LARGEST_MEMBER}")
                if name != key:
                    if members:
                        yield key, members
                    if name in seen:
                        raise RefusedMember(f"{shard}: the members of key {name} are not adjacent")
                    seen.add(name)
                    members = {}
                file = tar.extractfile(member)
                assert file is not None, "isfile() was true"
                key, members[kind] = name, file.read()
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is no complete tar file: {error}") from error
    if members:
        yield key, members
