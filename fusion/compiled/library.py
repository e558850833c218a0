"""The compiled loops as functions: machine code from a file beside this one or in the person's cache folder.

    library = find() or make()                        # some hundredths of a second; most of a minute to build
    library.kernels.encode(values, code, out)

Building needs numba and is done by a process of its own. A file is for one processor and one state of the sources; only a whole
one is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import llvmlite.binding as llvm
import numpy as np

from fusion.caching import cache_folder

HERE = Path(__file__).parent
SOURCES = ("build", "guard", "kernels", "memory", "registry", "streams", "twins", "vectors", "../dtypes")  # of the machine code
KEPT = 4  # files of a folder: for several processors, or for several versions
_SCALARS = {"none": (None, None), "bool": (ctypes.c_bool, bool), "int32": (ctypes.c_int32, int), "int64": (ctypes.c_int64, int),
            "uint32": (ctypes.c_uint32, int), "float64": (ctypes.c_double, float)}
_IN_ORDER = 0x101  # numpy's flags for contiguous and aligned


def _address(array: np.ndarray) -> int:
    """`array.ctypes.data` in a tenth of the time: a loop is called for every block."""
    return ctypes.c_size_t.from_address(id(array) + object.__basicsize__).value


if _address(_IN_MEMORY := np.zeros(1)) != _IN_MEMORY.ctypes.data:  # an interpreter, or a numpy, of another build

    def _address(array: np.ndarray) -> int:
        return array.ctypes.data


class Loop:
    """A function of machine code. Arrays must be contiguous and of its dtype: TypeError otherwise.

    It runs without the interpreter's lock. One `of_rows` is given rows [models, bytes] where it takes addresses.
    """

    def __init__(self, engine: llvm.ExecutionEngine, symbol: str, arguments: list, result: str, of_rows: bool):
        self._engine, self.address = engine, engine.get_function_address(symbol)  # who has a loop keeps its code
        self._arguments = [(np.dtype(kind) if sizes else None, sizes, kind) for kind, sizes in arguments]
        self._of_rows = of_rows
        kinds = [part for _, sizes, kind in self._arguments
                 for part in ([ctypes.c_void_p, *[ctypes.c_int64] * sizes] if sizes else [_SCALARS[kind][0]])]
        self._function = ctypes.CFUNCTYPE(_SCALARS[result][0], *kinds)(self.address)

    def takes(self, arguments: tuple) -> bool:
        """Whether arrays among these are of the right dtypes."""
        return all(dtype is None or value.dtype == dtype for (dtype, _, _), value in zip(self._arguments, arguments, strict=True))

    def __call__(self, *arguments: object) -> object:
        if self._of_rows:
            rows, *others = arguments
            arguments = (_address(rows) + rows.strides[0] * np.arange(len(rows)), *others)
        flat = []
        for (dtype, sizes, kind), value in zip(self._arguments, arguments, strict=True):
            if not sizes:
                flat.append(_SCALARS[kind][1](value))
            elif value.dtype == dtype and value.ndim == sizes and value.flags.num & _IN_ORDER == _IN_ORDER:
                flat += (_address(value), *value.shape)
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
    """Loaded machine code: `kernels`, `streams` and `guard` with their loops."""

    def __init__(self, code: bytes, functions: list[dict]):
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine()
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        found: dict[str, dict[str, list[Loop]]] = {}
        for its in functions:
            module, _, name = its["loop"].partition(".")
            loop = Loop(engine, its["symbol"], its["arguments"], its["result"], its["of_rows"])
            found.setdefault(module, {}).setdefault(name, []).append(loop)
        for module, loops in found.items():
            setattr(self, module, SimpleNamespace(**{name: its[0] if len(its) == 1 else Overloads(its)
                                                     for name, its in loops.items()}))


def find() -> Library | None:
    """The library from a file, None where there is none for this processor and these sources."""
    for folder in folders():
        made = read(folder / _name())
        if made is not None:
            return Library(*made)
    return None


def make() -> Library:
    """The library from a file that is built now, by a process that goes on when this one ends: the next one finds its file.

    RuntimeError with what that process said when it could not.
    """
    with tempfile.TemporaryDirectory() as nowhere:
        path = next(filter(_writable, folders()), Path(nowhere)) / _name()
        code = f"import sys; sys.path.insert(0, {str(HERE.parents[1])!r})\n" \
               f"from fusion.compiled.library import keep; keep({str(path)!r})"
        done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              start_new_session=True, check=False)
        made = read(path)
    if made is None:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])
    return Library(*made)


def keep(path: str) -> None:
    """Build the loops and write them to this file, whole or not at all; remove the oldest files beside it."""
    from fusion.compiled.build import build

    with contextlib.suppress(OSError):  # 400 MB: where memory is short, Linux should end this and not the merge
        Path("/proc/self/oom_score_adj").write_text("1000")
    code, functions = build()
    if Path(path).name != _name():
        raise RuntimeError("the sources were changed while they were built")
    head = json.dumps({"digest": _digest(code, functions), "functions": functions})
    folder = Path(path).parent
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(head.encode() + b"\n" + code)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    for old in sorted(folder.glob("fusechat-loops-*.bin"), key=lambda path: -path.stat().st_mtime)[KEPT:]:
        old.unlink(missing_ok=True)


def folders() -> tuple[Path, ...]:
    """Where files may lie, the first choice first."""
    return HERE / "__pycache__", cache_folder()


def read(path: Path) -> tuple[bytes, list[dict]] | None:
    """The content of a file; None when there is none, or it is not whole."""
    try:
        head, _, code = path.read_bytes().partition(b"\n")
        known = json.loads(head)
    except (OSError, ValueError):
        return None
    if not isinstance(known, dict) or known.get("digest") != _digest(code, known.get("functions")):
        return None
    return code, known["functions"]


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _digest(code: bytes, functions: object) -> str:
    return hashlib.sha256(json.dumps(functions).encode() + code).hexdigest()


def _name() -> str:
    """A file's name: of the processor, and of all that decides what the machine code does."""
    mark = hashlib.sha256("|".join([llvm.get_process_triple(), llvm.get_host_cpu_name(),
                                    llvm.get_host_cpu_features().flatten()]).encode())
    for name in SOURCES:
        mark.update((HERE / f"{name}.py").read_bytes())
    return f"fusechat-loops-{mark.hexdigest()[:16]}.bin"
