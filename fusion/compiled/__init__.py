"""The inner loops, twice: compiled by numba (`kernels`) and in plain numpy (`twins`). Both give the same bytes.

    compiled.prepare(nbytes)                # at the start of a piece of work that will handle so many bytes
    compiled.loops().hash_words(…)          # per block: whichever of the two is ready

numba is optional. It is imported, and its machine code loaded from the cache on disk, only when the work is large enough to
pay for that. Where there is no cache yet it is compiled in a thread of its own while numpy works. FUSECHAT_COMPILED=0 keeps to
numpy, 1 waits for numba whatever the size. Price: one second of one core per process, and once some thirty to compile.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from types import ModuleType

from fusion.compiled import twins
from fusion.errors import ResourceError

PAYS_BYTES = 400_000_000  # measured: 0.4 s to load, 1 s of processor time saved for each GB read
PATIENCE_S = 2.5  # loading from the cache takes less; beside it numpy would get little done and slow it down
_lock = threading.Lock()
_thread: threading.Thread | None = None
_kernels: ModuleType | None = None
_streams: ModuleType | None = None
_refused = False


def loops() -> ModuleType:
    """The module whose loops to call now: `kernels` once they are ready, else `twins`."""
    return twins if _kernels is None or _refused else _kernels


def streaming() -> ModuleType | None:
    """The module that reads and handles many blocks at once, None where `loops` are the twins."""
    return None if _kernels is None or _refused else _streams


def prepare(nbytes: int) -> None:
    """Load the compiled loops if handling `nbytes` pays for it; returns when they are ready or must first be compiled.

    With FUSECHAT_COMPILED=1 it waits for that too.

    ResourceError when FUSECHAT_COMPILED=1 and they cannot be had.
    """
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
    global _kernels, _streams
    try:
        kernels = importlib.import_module("fusion.compiled.kernels")
        _streams, _kernels = importlib.import_module("fusion.compiled.streams"), kernels
    except ImportError:
        logging.getLogger(__name__).info("numba is not installed; numpy does the work")
    except Exception as error:  # a numba that does not fit this Python or processor must not stop a merge that works without
        logging.getLogger(__name__).warning("numba cannot be used (%s: %s); numpy does the work", type(error).__name__, error)
