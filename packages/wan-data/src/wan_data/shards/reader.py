"""Reading the samples of a shard in order, without running code from it.

L text tokens, D text width; a latent is [C, F, H, W].
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from torch import Tensor

from wan_data.shards.serialization import MEMBERS, RefusedMember, info_from_json, latent_from_pth, text_from_pickle
from wan_data.shards.tar_headers import Member, read_member, tar_members
from wan_data.storage.files import open_for_reading
from wan_data.storage.location import Location

_READERS: dict[str, Callable[[bytes], Any]] = {
    "json": info_from_json,
    "pickle": text_from_pickle,
    "pth": latent_from_pth,
}
_MOST_MEMBERS = 100  # of a sample


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

    @classmethod
    def decode(cls, key: str, members: Mapping[str, bytes]) -> "StoredSample":
        """Decode the members of a sample without running code.

        Args:
            key: of the sample.
            members: the bytes of each member by extension.

        Raises:
            RefusedMember: a member is missing, of another format, or refused; it is named.
        """
        decoded: dict[str, Any] = {}
        for kind, content in members.items():
            name = f"{key.rpartition('/')[2]}.{kind}"
            if kind not in _READERS:
                raise RefusedMember(f"{name} is no member of this format; expected {', '.join(MEMBERS)}")
            try:
                decoded[kind] = _READERS[kind](content)
            except RefusedMember as error:
                raise RefusedMember(f"member {name} is refused: {error}") from None
        if missing := [name for name in MEMBERS if name not in decoded]:
            raise RefusedMember(f"it has no {' and no '.join(missing)} member")
        return cls(key, decoded["pth"], decoded["pickle"], decoded["json"])


def grouped(members: Iterable[Member]) -> Iterator[tuple[str, list[Member]]]:
    """The members of each sample, which are adjacent, with its key.

    Raises:
        RefusedMember: two members of a sample have the same name, or it has more than ``_MOST_MEMBERS``.
    """
    key, of_key = "", dict[str, Member]()
    for member in members:
        if of_key and member.key != key:
            yield key, list(of_key.values())
            of_key = {}
        if member.name in of_key:
            raise RefusedMember(f"it holds {member.name!r:.200} twice")
        if len(of_key) == _MOST_MEMBERS:
            raise RefusedMember(f"its sample {member.key!r:.200} has more than {_MOST_MEMBERS} members")
        key, of_key[member.name] = member.key, member
    if of_key:
        yield key, list(of_key.values())


def read_members(file: BinaryIO, members: Iterable[Member]) -> dict[str, bytes]:
    """The content of a sample's members by extension; empty for those that are not of this format."""
    return {one.kind: read_member(file, one) if one.kind in _READERS else b"" for one in members}


def samples_of(shard: Location) -> Iterator[StoredSample]:
    """The samples of a shard, in order.

    Raises:
        ValueError: the file is no complete tar file, or a sample is invalid; the message names shard and key.
    """
    for key, members in members_of(shard):
        try:
            yield StoredSample.decode(key, members)
        except RefusedMember as error:
            raise RefusedMember(f"shard {shard.name}, sample {key}: {error}") from None


def infos_of(shard: Location) -> Iterator[dict[str, Any]]:
    """The side information of each sample of a shard, in order; latents and texts are not read.

    Raises:
        ValueError: the file is no complete tar file, or a sample has no side information.
    """
    with open_for_reading(shard) as file:
        for key, members in grouped(tar_members(file)):
            found = [member for member in members if member.kind == "json"]
            if not found:
                raise RefusedMember(f"shard {shard.name}, sample {key}: it has no json member")
            yield info_from_json(read_member(file, found[0]))


def text_lengths(info: Mapping[str, Any]) -> tuple[int, int] | None:
    """Text tokens and characters of the caption of a sample; None if its side information does not say them."""
    tokens, caption = info.get("text_tokens"), info.get("caption")
    return (tokens, len(caption)) if type(tokens) is int and tokens >= 0 and isinstance(caption, str) else None


def members_of(shard: Location) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key of each sample and the content of its members by their kinds, in order.

    Raises:
        ValueError: the file is no complete tar file, or has a member that is refused.
    """
    seen: set[str] = set()
    with open_for_reading(shard) as file:
        groups = grouped(tar_members(file))
        while True:
            try:
                key, members = next(groups)
            except StopIteration:
                return
            except ValueError as error:
                raise RefusedMember(f"shard {shard}: {error}") from None
            if key in seen:
                raise RefusedMember(f"shard {shard}: the members of key {key} are not adjacent")
            seen.add(key)
            try:
                content = read_members(file, members)
            except RefusedMember as error:
                raise RefusedMember(f"shard {shard.name}, sample {key}: {error}") from None
            yield key, content
