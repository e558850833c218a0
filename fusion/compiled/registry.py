"""The loops to compile, as their modules declare them; `build` makes machine code of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numba

OPTIONS = {"nogil": True, "error_model": "numpy"}  # no fastmath: see `kernels`
helper = numba.njit(**OPTIONS)  # for loops to call, not for anybody else


class Declared(NamedTuple):
    """A loop and the numba signatures that it is compiled for; `of_rows`: its first argument are addresses of rows."""

    loop: Callable
    signatures: tuple
    of_rows: bool


LOOPS: dict[str, Declared] = {}  # by "module.name"


def compiled(*signatures, of_rows: bool = False):
    """Declare a loop. It cannot raise and allocates nothing of the interpreter's: there is none where it runs."""
    def decorate(function):
        loop = helper(function)
        LOOPS[f"{function.__module__.rpartition('.')[2]}.{function.__name__}"] = Declared(loop, signatures, of_rows)
        return loop
    return decorate
