"""Files seen as memory: loops read them at twice the speed of copies, and nothing is copied.

    here = mapped(descriptor)               # None where that cannot be had: then read
    here.address, here.lost                 # of the first byte; of the word that is not 0 once a page could not be had

A file that becomes shorter while it is mapped would end the process, so nothing is mapped without the handler of
`compiled.guard`. Whoever reads a map looks at that word afterwards.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import threading

import numpy as np

from fusion import compiled

MAPS = 4096  # at once; whoever comes later reads
_HEAD, _ENTRY = 3, 3  # as in `compiled.guard`
_table = np.zeros(_HEAD + _ENTRY * MAPS, np.int64)
_lock = threading.Lock()


class _Action(ctypes.Structure):
    """How Linux's C libraries lay out what is done for a signal."""

    _fields_ = (("handler", ctypes.c_void_p), ("mask", ctypes.c_ubyte * 128),
                ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p))


_LIBC = ctypes.CDLL(None, use_errno=True)
_SA_SIGINFO, _SA_RESTART = 4, 0x10000000
GUARDED = sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64")
_before = _Action()


class Map:
    """A file from its first to its last byte, `size` of them, from `address` on, for as long as this object lives."""

    def __init__(self, descriptor: int):
        self._bytes = np.frombuffer(mmap.mmap(descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ), np.uint8)
        self.address, self.size = self._bytes.ctypes.data, len(self._bytes)
        with _lock:
            self._entry = next(entry for entry in range(_HEAD, len(_table), _ENTRY) if not _table[entry + 1])
            _table[self._entry:self._entry + _ENTRY] = self.address, self.address + self.size, 0
            _table[0] = max(_table[0], (self._entry - _HEAD) // _ENTRY + 1)
        self.lost = _table.ctypes.data + 8 * (self._entry + 2)

    @property
    def broken(self) -> bool:
        """Whether a page could not be had: what was read is worthless, and so is all that will be."""
        return bool(_table[self._entry + 2])

    def view(self, start: int, nbytes: int) -> np.ndarray:
        """These bytes of the file, uint8, for as long as the map lives; look at `broken` after reading them."""
        return self._bytes[start:start + nbytes]

    def __del__(self):
        if hasattr(self, "lost"):
            with _lock:
                _table[self._entry:self._entry + _ENTRY] = 0


def mapped(descriptor: int) -> Map | None:
    """The map of an open file, None where files are read: no compiled loops, another system, no file that can be mapped."""
    if not GUARDED or compiled.streaming() is None:
        return None
    try:
        _watch()
        return Map(descriptor)
    except (OSError, ValueError, StopIteration):  # an empty file, a pipe, a file system without maps, too many maps
        return None


def _watch() -> None:
    """See that the handler is in its place; the one that was there gets what is not in a map."""
    with _lock:
        handler, now = compiled.handler(), _Action()
        _sigaction(None, now)
        if now.handler == handler:
            return
        ctypes.memmove(ctypes.byref(_before), ctypes.byref(now), ctypes.sizeof(now))
        _table[1], _table[2] = mmap.PAGESIZE, ctypes.addressof(_before)
        ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)(handler)(-1, _table.ctypes.data, 0)
        _sigaction(_Action(handler, flags=_SA_SIGINFO | _SA_RESTART), None)


def _sigaction(new: _Action | None, old: _Action | None) -> None:
    if _LIBC.sigaction(signal.SIGBUS, new and ctypes.byref(new), old and ctypes.byref(old)):
        raise OSError(ctypes.get_errno(), "sigaction")
