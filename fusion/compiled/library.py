"""The compiled loops as functions: machine code from a file beside this one or in the person's cache folder, else built anew.

    library = load()                                  # some hundredths of a second, half a minute where it must be built
    library.kernels.encode(values, code, out)

Only building needs numba. A file is for one processor and one state of the sources, and is loaded when its digest is right.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import llvmlite.binding as llvm
import numpy as np

from fusion.pickles import cache_folder

HERE = Path(__file__).parent
KEPT = 4  # files of a folder: for several processors, or for several versions
_SCALARS = {"none": (None, None), "bool": (ctypes.c_bool, bool), "int32": (ctypes.c_int32, int), "int64": (ctypes.c_int64, int),
            "uint32": (ctypes.c_uint32, int), "float64": (ctypes.c_double, float)}


class Loop:
    """A function of machine code. Arrays must be contiguous and of its dtype: TypeError otherwise.

    It runs without the interpreter's lock. One `of_rows` is given rows [models, bytes] where it takes addresses.
    """

    def __init__(self, address: int, arguments: list, result: str, of_rows: bool):
        self.address, self._arguments = address, [(np.dtype(kind) if sizes else None, sizes, kind) for kind, sizes in arguments]
        self._of_rows = of_rows
        kinds = [part for _, sizes, kind in self._arguments
                 for part in ([ctypes.c_void_p, *[ctypes.c_int64] * sizes] if sizes else [_SCALARS[kind][0]])]
        self._function = ctypes.CFUNCTYPE(_SCALARS[result][0], *kinds)(address)

    def takes(self, arguments: tuple) -> bool:
        """Whether arrays among these are of the right dtypes."""
        return all(dtype is None or value.dtype == dtype for (dtype, _, _), value in zip(self._arguments, arguments, strict=True))

    def __call__(self, *arguments: object) -> object:
        if self._of_rows:
            rows, *others = arguments
            arguments = (rows.ctypes.data + rows.strides[0] * np.arange(len(rows)), *others)
        flat = []
        for (dtype, sizes, kind), value in zip(self._arguments, arguments, strict=True):
            if not sizes:
                flat.append(_SCALARS[kind][1](value))
            elif value.dtype == dtype and value.ndim == sizes and value.flags.c_contiguous and value.flags.aligned:
                flat += (value.__array_interface__["data"][0], *value.shape)
            else:
                raise TypeError(f"{value.ndim} dimensions of {value.dtype} where {sizes} of {dtype} are needed, in order")
        return self._function(*flat)


class Overloads:
    """Loops of one name for several dtypes."""

    def __init__(self, loops: list[Loop]):
        self._loops = loops

    def __call__(self, *arguments: object) -> object:
        return next((loop for loop in self._loops if loop.takes(arguments)), self._loops[0])(*arguments)


class Library:
    """Loaded machine code: `kernels`, `streams` and `guard` with their loops; it must live as long as they are used."""

    def __init__(self, code: bytes, functions: list[dict]):
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine()
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        found: dict[str, dict[str, list[Loop]]] = {}
        for its in functions:
            module, _, name = its["loop"].partition(".")
            loop = Loop(self._engine.get_function_address(its["symbol"]), its["arguments"], its["result"], its["of_rows"])
            found.setdefault(module, {}).setdefault(name, []).append(loop)
        for module, loops in found.items():
            setattr(self, module, SimpleNamespace(**{name: its[0] if len(its) == 1 else Overloads(its)
                                                     for name, its in loops.items()}))


def load() -> Library:
    """The library, from a file or built; ImportError where it must be built and numba is not installed."""
    name = f"fusechat-loops-{_key()}.bin"
    for folder in folders():
        made = read(folder / name)
        if made is not None:
            return Library(*made)
    from fusion.compiled.build import build

    code, functions = build()
    _keep(name, code, functions)
    return Library(code, functions)


def folders() -> Iterator[Path]:
    """Where files may lie, the first choice first."""
    yield HERE / "__pycache__"
    yield cache_folder()


def read(path: Path) -> tuple[bytes, list[dict]] | None:
    """The content of a file; None when there is none, or it is not whole."""
    try:
        head, _, code = path.read_bytes().partition(b"\n")
        known = json.loads(head)
    except (OSError, ValueError):
        return None
    if not isinstance(known, Mapping) or known.get("digest") != _digest(code, known.get("functions")):
        return None
    return code, known["functions"]


def _keep(name: str, code: bytes, functions: list[dict]) -> None:
    """Write the file where that is possible, and remove the oldest ones there."""
    head = json.dumps({"digest": _digest(code, functions), "functions": functions})
    for folder in folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                file.write(head.encode() + b"\n" + code)
            os.replace(file.name, folder / name)
            for old in sorted(folder.glob("fusechat-loops-*.bin"), key=lambda path: -path.stat().st_mtime)[KEPT:]:
                old.unlink()
            return
        except OSError:
            continue
    logging.getLogger(__name__).info("there is no folder to keep compiled loops in; the next start builds them again")


def _digest(code: bytes, functions: object) -> str:
    return hashlib.sha256(json.dumps(functions).encode() + code).hexdigest()


def _key() -> str:
    """Of the processor and of all that decides what the machine code does."""
    sources = sorted([*HERE.glob("*.py"), HERE.parent / "dtypes.py"])
    mark = hashlib.sha256("|".join([llvm.get_process_triple(), llvm.get_host_cpu_name(),
                                    llvm.get_host_cpu_features().flatten()]).encode())
    for source in sources:
        mark.update(source.read_bytes())
    return mark.hexdigest()[:16]
