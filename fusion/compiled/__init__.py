"""The inner loops: compiled by numba (`kernels`), in plain numpy (`twins`) with the same bytes, or on a GPU (`device`).

    compiled.prepare(nbytes)                # at the start of a piece of work that will handle so many bytes
    compiled.loops().hash_words(…)          # per block of `compiled.block()` numbers: whichever of them is ready

numba is optional. It is imported, and its machine code loaded from the cache on disk, only when the work is large enough to
pay for that. Where there is no cache yet it is compiled in a thread of its own while numpy works. FUSECHAT_COMPILED=0 keeps to
numpy, 1 waits for numba whatever the size. Price: half a second of one core per process, and once some thirty to compile.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from fusion.compiled import twins
from fusion.errors import ResourceError

if TYPE_CHECKING:
    from fusion.compiled.device import DeviceLoops

DEVICE_BLOCKS = 64  # blocks handed to a device at once: a transfer of some megabytes takes longer than to begin it
PAYS_BYTES = 400_000_000  # measured: 0.4 s to load, 1 s of processor time saved for each GB read
PATIENCE_S = 2.5  # loading from the cache takes less; beside it numpy would get little done and slow it down
_lock = threading.Lock()


class Loops:
    """A module of compiled loops, each made `ready` when it is first asked for.

    Where a twin takes rows [models, bytes] a loop takes their addresses, which it gets here.
    """

    def __init__(self, module: ModuleType, ready: Callable):
        self._module, self._ready = module, ready

    def __getattr__(self, name: str):
        found = getattr(self._module, name)
        if not hasattr(found, "signatures"):
            return found
        call = self._ready(found)
        if name in getattr(self._module, "OF_ROWS", ()):
            call = _addressed(call)
        setattr(self, name, call)
        return call


def _addressed(loop: Callable) -> Callable:
    def call(rows: np.ndarray, *arguments: object) -> object:
        return loop(rows.ctypes.data + rows.strides[0] * np.arange(len(rows)), *arguments)
    return call


_thread: threading.Thread | None = None
_kernels: Loops | None = None
_streams: Loops | None = None
_handler = 0
_refused = False
_device: DeviceLoops | None = None


def loops() -> ModuleType | Loops | DeviceLoops:
    """Whose loops to call now: the device's, `kernels` once they are ready, else `twins`."""
    return _on_processor() if _device is None else _device


def streaming() -> Loops | None:
    """The module that reads and handles many blocks at once, None where `loops` are not the kernels."""
    return None if _device is not None or _kernels is None or _refused else _streams


def handler() -> int:
    """The address of the handler that lets `streaming` loops read mapped files, see `guard`."""
    return _handler


def block() -> int:
    """How many numbers of a model to hand to `loops` at once."""
    return twins.BLOCK if _device is None else DEVICE_BLOCKS * twins.BLOCK


def most() -> int:
    """How many numbers of a model one call of a loop may handle, with `streaming` or without."""
    return max(twins.STRETCH, block())


def prepare(nbytes: int, device: str | None = None) -> None:
    """Load the compiled loops if handling `nbytes` pays for it; returns when they are ready or must first be compiled.

    With FUSECHAT_COMPILED=1 it waits for that too. `device`: "cpu", "auto" (a GPU where there is one), or one that torch
    knows; it holds for all work of this process until another one is given.

    ResourceError when FUSECHAT_COMPILED=1 and they cannot be had, or when there is no such device.
    """
    global _device
    _prepare_kernels(nbytes)
    if device == "cpu":
        _device = None
    elif device is not None:
        from fusion.compiled.device import DeviceLoops, pick

        place = pick(device)
        _device = None if place == "cpu" else DeviceLoops(place, _on_processor)


def _on_processor() -> ModuleType | Loops:
    return twins if _kernels is None or _refused else _kernels


def _prepare_kernels(nbytes: int) -> None:
    global _thread, _refused
    wish = os.environ.get("FUSECHAT_COMPILED", "")
    _refused = wish == "0"
    if _refused or (wish != "1" and nbytes < PAYS_BYTES):
        return
    with _lock:
        if _thread is None:
            _thread = threading.Thread(target=_load, name="compiled loops")
            _thread.start()
    _thread.join(None if wish == "1" else PATIENCE_S)
    if wish == "1" and _kernels is None:
        raise ResourceError("the compiled loops cannot be used", where="FUSECHAT_COMPILED=1",
                                todo="Install numba, or unset FUSECHAT_COMPILED.")


def _load() -> None:
    global _kernels, _streams, _handler
    try:
        kernels, streams, guard = (importlib.import_module(f"fusion.compiled.{name}") for name in ("kernels", "streams", "guard"))
        kernels.prepare()
        _handler = guard.handler()
        _streams, _kernels = Loops(streams, kernels.ready), Loops(kernels, kernels.ready)
    except ImportError:
        logging.getLogger(__name__).info("numba is not installed; numpy does the work")
    except Exception as error:  # a numba that does not fit this Python or processor must not stop a merge that works without
        logging.getLogger(__name__).warning("numba cannot be used (%s: %s); numpy does the work", type(error).__name__, error)
