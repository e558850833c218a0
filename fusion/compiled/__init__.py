"""The inner loops: compiled (`kernels`), in plain numpy (`twins`) with the same bytes, or on a GPU (`device`).

    compiled.prepare(nbytes)                # at the start of a piece of work that will handle so many bytes
    compiled.loops().hash_words(…)          # per block of `compiled.block()` numbers: whichever of them is ready

Machine code is loaded from a file (`library`) when the work is large enough to pay for that. Where there is none yet, a process
of its own makes it with numba (`build`) while numpy works; numba is optional. FUSECHAT_COMPILED=0 keeps to numpy, 1 waits for
machine code whatever the size. Price: some hundredths of a second per process, and once some forty seconds of one core.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

from fusion.compiled import twins
from fusion.errors import ResourceError

if TYPE_CHECKING:
    from fusion.compiled.device import DeviceLoops
    from fusion.compiled.library import Library, Loop

DEVICE_BLOCKS = 64  # blocks handed to a device at once: a transfer of some megabytes takes longer than to begin it
LOADING_PAYS, BUILDING_PAYS = 50_000_000, 400_000_000  # bytes: measured, 1 s of processor time saved for each GB read
_lock = threading.Lock()
_thread: threading.Thread | None = None
_library: Library | None = None
_refused = False
_device: DeviceLoops | None = None


def loops() -> ModuleType | SimpleNamespace | DeviceLoops:
    """Whose loops to call now: the device's, `kernels` once they are ready, else `twins`."""
    return _on_processor() if _device is None else _device


def streaming() -> SimpleNamespace | None:
    """The module that reads and handles many blocks at once, None where `loops` are not the kernels."""
    return None if _device is not None or _library is None or _refused else _library.streams


def guarding() -> Loop:
    """The handler that lets `streaming` loops read mapped files, see `guard`."""
    return _library.guard.guard


def block() -> int:
    """How many numbers of a model to hand to `loops` at once."""
    return twins.BLOCK if _device is None else DEVICE_BLOCKS * twins.BLOCK


def most() -> int:
    """How many numbers of a model one call of a loop may handle, with `streaming` or without."""
    return max(twins.STRETCH, block())


def prepare(nbytes: int, device: str | None = None) -> None:
    """Load the compiled loops if handling `nbytes` pays for it, or let them be built; returns when they are ready or it has begun.

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


def _on_processor() -> ModuleType | SimpleNamespace:
    return twins if _library is None or _refused else _library.kernels


def _prepare_kernels(nbytes: int) -> None:
    global _library, _thread, _refused
    wish = os.environ.get("FUSECHAT_COMPILED", "")
    _refused = wish == "0"
    if _refused or _library is not None or (wish != "1" and nbytes < LOADING_PAYS):
        return
    with _lock:
        _library = _library or _unless_it_fails(lambda library: library.find())
        if _library is None and _thread is None and (wish == "1" or nbytes >= BUILDING_PAYS):
            _thread = threading.Thread(target=_make, name="compiled loops", daemon=True)
            _thread.start()
    if wish != "1":
        return
    if _thread is not None:
        _thread.join()
    if _library is None:
        raise ResourceError("the compiled loops cannot be used", where="FUSECHAT_COMPILED=1",
                            todo="Install numba, or unset FUSECHAT_COMPILED.")


def _make() -> None:
    global _library
    if importlib.util.find_spec("numba") is None:
        logging.getLogger(__name__).info("numba is not installed; numpy does the work")
    else:
        _library = _unless_it_fails(lambda library: library.make())


def _unless_it_fails(get: Callable[[ModuleType], Library | None]) -> Library | None:
    """What `get` gets from the library's module; a numba or LLVM that does not fit must not stop work that goes without."""
    try:
        return get(importlib.import_module("fusion.compiled.library"))
    except ImportError:
        return None
    except Exception as error:
        logging.getLogger(__name__).warning("loops cannot be compiled (%s: %s); numpy does the work", type(error).__name__, error)
        return None
