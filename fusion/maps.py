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
_HEAD, _ENTRY = 4, 3  # as in `compiled.guard`
_table = np.zeros(_HEAD + _ENTRY * MAPS, np.int64)
_lock = threading.RLock()  # a map may go while another is made, by the same thread


class _Action(ctypes.Structure):
    """How Linux's C libraries lay out what is done for a signal."""

    _fields_ = (("handler", ctypes.c_void_p), ("mask", ctypes.c_ubyte * 128),
                ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p))


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype, _FAILED = ctypes.c_void_p, ctypes.c_void_p(-1).value
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_SA_SIGINFO, _SA_RESTART = 4, 0x10000000
GUARDED = sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64")
_before, _default = _Action(), _Action()
_ours: dict[int, object] = {}  # handlers by address; their code must stay


class Map:
    """A file from its first to its last byte, `size` of them, from `address` on, for as long as this object lives."""

    def __init__(self, descriptor: int):
        self.size = os.fstat(descriptor).st_size
        with _lock:
            self._entry = next(entry for entry in range(_HEAD, len(_table), _ENTRY) if not _table[entry + 1])
            self.address = _LIBC.mmap(None, self.size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
            if self.address == _FAILED:  # Python's own maps hold a second open file each
                raise OSError(ctypes.get_errno(), "mmap")
            _table[self._entry], _table[self._entry + 2] = self.address, 0
            _table[self._entry + 1] = self.address + self.size  # last: from here on the handler knows it
            _table[0] = max(_table[0], (self._entry - _HEAD) // _ENTRY + 1)
        self.lost = _table.ctypes.data + 8 * (self._entry + 2)

    @property
    def broken(self) -> bool:
        """Whether a page could not be had: what was read is worthless, and so is all that will be."""
        return bool(_table[self._entry + 2])

    def view(self, start: int, nbytes: int) -> np.ndarray:
        """These bytes of the file, uint8, for as long as the map lives; look at `broken` after reading them."""
        return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(self.address + start), np.uint8)

    def __del__(self, lock=_lock, table=_table, unmap=_LIBC.munmap):  # all else may be gone
        if hasattr(self, "lost"):
            with lock:
                table[self._entry + 1] = 0
                unmap(self.address, self.size)


def mapped(descriptor: int) -> Map | None:
    """The map of an open file, None where files are read: no compiled loops, another system, no file that can be mapped."""
    if not GUARDED or compiled.streaming() is None:
        return None
    try:
        _watch()
        return Map(descriptor)
    except (OSError, StopIteration):  # an empty file, a folder, a file system without maps, too many maps
        return None


def _watch() -> None:
    """See that the handler is in its place; the one that was there gets what is not in a map."""
    with _lock:
        now = _Action()
        _sigaction(None, now)
        if now.handler in _ours:
            return
        guard = compiled.guarding()
        _ours[guard.address] = guard
        ctypes.memmove(ctypes.byref(_before), ctypes.byref(now), ctypes.sizeof(now))
        _table[1:_HEAD] = mmap.PAGESIZE, ctypes.addressof(_before), ctypes.addressof(_default)
        guard(-1, _table.ctypes.data, 0)
        _sigaction(_Action(guard.address, flags=_SA_SIGINFO | _SA_RESTART), None)


def _sigaction(new: _Action | None, old: _Action | None) -> None:
    if _LIBC.sigaction(signal.SIGBUS, new and ctypes.byref(new), old and ctypes.byref(old)):
        raise OSError(ctypes.get_errno(), "sigaction")
