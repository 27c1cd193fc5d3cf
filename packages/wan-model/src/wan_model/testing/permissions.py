"""Permissions of files for tests that run as root, which may read and write everything."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

# Linux's capget and capset: the version of 64 capabilities in two words, and those that override permissions.
_VERSION_3 = 0x20080522
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1 << 1, 1 << 2


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Words(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def _call(name: str, header: _Header, words: ctypes.Array[_Words]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(ctypes.byref(header), words):
        raise OSError(ctypes.get_errno(), f"{name} failed")


@contextlib.contextmanager
def permissions_apply() -> Iterator[None]:
    """In this context permissions of files hold for this thread also if it is root's; it starts no process meanwhile.

    Raises:
        OSError: the system does not allow it.
    """
    if os.geteuid() != 0 or sys.platform != "linux":
        yield
        return
    header, words = _Header(_VERSION_3, 0), (_Words * 2)()
    _call("capget", header, words)
    before = words[0].effective
    words[0].effective = before & ~(_DAC_OVERRIDE | _DAC_READ_SEARCH)
    _call("capset", header, words)
    try:
        yield
    finally:
        words[0].effective = before
        _call("capset", header, words)
