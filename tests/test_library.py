"""fusion.compiled.library and build: which loops are used, and where machine code comes from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fusion import compiled
from fusion.compiled import twins
from fusion.errors import ResourceError
from tests.test_structure import imports

ROOT = Path(__file__).parent.parent


# ── which of the two ─────────────────────────────────────────────────────────────────────────────────────────────────

def python(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WHICH = "print('twins' if compiled.loops() is compiled.twins else 'kernels', 'numba' in sys.modules)"


@pytest.mark.parametrize(("wish", "nbytes", "expected"), [("", 10**6, "twins"), ("0", 10**12, "twins"), ("1", 1, "kernels"),
                                                          ("", 10**12, "kernels"), ("", 10**8, "kernels")])
def test_machine_code_is_loaded_when_the_work_pays_for_it_or_when_it_is_forced_and_never_numba(library, wish, nbytes, expected):
    code = f"import sys; from fusion import compiled; compiled.prepare({nbytes})\n{WHICH}"
    assert python(code, FUSECHAT_COMPILED=wish) == f"{expected} False"


NO_NUMBA = "import sys; sys.modules['numba'] = None\nfrom fusion import compiled\nfrom fusion.compiled import library\n"
NOWHERE = "import pathlib; library.folders = lambda: (pathlib.Path({!r}),)\n"


def test_without_numba_what_was_built_is_used(library):
    assert python(NO_NUMBA + f"compiled.prepare(10**12)\n{WHICH}", FUSECHAT_COMPILED="") == "kernels True"  # a None in its place


def test_without_numba_and_without_a_file_numpy_does_the_work(tmp_path):
    code = NO_NUMBA + NOWHERE.format(str(tmp_path)) + f"compiled.prepare(10**12); compiled._thread.join()\n{WHICH}"
    assert python(code, FUSECHAT_COMPILED="") == "twins True"


def test_without_llvm_numpy_does_the_work():
    code = f"import sys; sys.modules['llvmlite'] = None\nfrom fusion import compiled\ncompiled.prepare(10**12)\n{WHICH}"
    assert python(code, FUSECHAT_COMPILED="").startswith("twins")


def test_forcing_what_is_not_installed_is_an_error(tmp_path):
    code = (NO_NUMBA + NOWHERE.format(str(tmp_path))
            + "try: compiled.prepare(1)\nexcept Exception as error: print(type(error).__name__, error)")
    assert python(code, FUSECHAT_COMPILED="1").startswith("ResourceError FUSECHAT_COMPILED=1: the compiled loops cannot be used")


@pytest.fixture
def nothing_loaded(monkeypatch):
    """As in a new process whose loops are not built."""
    from fusion.compiled import library

    for name in ("_library", "_thread"):
        monkeypatch.setattr(compiled, name, None)
    monkeypatch.setenv("FUSECHAT_COMPILED", "")
    monkeypatch.setattr(library, "find", lambda: None)
    return library


def test_a_numba_that_fails_does_not_stop_the_work(nothing_loaded, monkeypatch, caplog):
    monkeypatch.setattr(nothing_loaded, "make", lambda: 1 / 0)
    compiled.prepare(10**12)
    compiled._thread.join()
    assert compiled.loops() is twins and "loops cannot be compiled (ZeroDivisionError" in caplog.text
    monkeypatch.setenv("FUSECHAT_COMPILED", "1")
    with pytest.raises(ResourceError, match="cannot be used"):
        compiled.prepare(1)


def test_the_loops_are_the_twins_until_the_others_are_ready(nothing_loaded, monkeypatch):
    ready, other = threading.Event(), type(sys)("other")
    other.kernels = other.streams = "others"
    monkeypatch.setattr(nothing_loaded, "make", lambda: ready.wait(10) and other)
    compiled.prepare(10**8)
    assert compiled._thread is None  # a minute of work is too much for so little
    compiled.prepare(10**12)
    assert compiled.loops() is twins and compiled.streaming() is None
    ready.set()
    compiled._thread.join()
    assert compiled.loops() == compiled.streaming() == "others"


# ── machine code ─────────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_file_is_built_where_it_can_be_and_used_when_it_is_whole(library, tmp_path, monkeypatch):
    from fusion.compiled import library as module

    code, functions = next(filter(None, (module.read(folder / module._name()) for folder in module.folders())))
    for number in range(module.KEPT + 2):  # of other processors
        (old := tmp_path / f"fusechat-loops-{number}.bin").write_bytes(b"")
        os.utime(old, (number, number))
    monkeypatch.setattr(module, "folders", lambda: (ROOT / "README.md" / "nowhere", tmp_path))
    assert module.find() is None
    (tmp_path / "built").write_text(repr((code, functions)))
    fake = f"import fusion.compiled.build as build\nbuild.build = lambda: eval(open({str(tmp_path / 'built')!r}).read())\n"
    run = subprocess.run
    monkeypatch.setattr(module.subprocess, "run", lambda command, **how: run([*command[:2], put_in(command[2], fake)], **how))
    values, row = np.arange(9, dtype=np.float32), np.zeros(36, np.uint8)
    for made in (module.make(), module.find()):
        row[:] = 0
        assert made.kernels.encode(values, twins.F32, row) and row.tobytes() == values.tobytes()
    (tmp_path / "built").unlink()
    kept = [path.name for path in tmp_path.iterdir()]
    assert len(kept) == module.KEPT and module._name() in kept and "fusechat-loops-0.bin" not in kept
    path = tmp_path / module._name()
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:1000], b"", b"\n", b"[]\n", whole.replace(b"kernels.draw", b"kernels.drew")):
        path.write_bytes(broken)
        assert module.find() is None


def put_in(code: str, more: str) -> str:
    """The code of a process with more in front of its second line."""
    first, rest = code.split("\n", 1)
    return f"{first}\n{more}{rest}"


def test_a_build_that_fails_says_why(monkeypatch, tmp_path):
    from fusion.compiled import library as module

    monkeypatch.setattr(module, "folders", lambda: (tmp_path,))
    monkeypatch.setattr(module.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="status 1"):
        module.make()
    monkeypatch.setattr(module.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho 'SystemError: no such processor' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(RuntimeError, match="SystemError: no such processor"):
        module.make()
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


def test_other_sources_have_other_machine_code(library, monkeypatch, tmp_path):
    from fusion.compiled import library as module

    shutil.copytree(ROOT / "fusion", tmp_path / "fusion", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(module, "HERE", tmp_path / "fusion/compiled")
    name = module._name()
    used, todo = set(), ["compiled/build"]
    while todo:
        used.add(source := todo.pop())
        for wanted in imports(ROOT / f"fusion/{source}.py"):  # of a module, or of what is in it
            parts = wanted.split(".")[1:]
            found = [part for part in ("/".join(parts), "/".join(parts[:-1])) if (ROOT / f"fusion/{part}.py").is_file()]
            todo += set(found) - used
    assert {os.path.normpath(f"compiled/{source}") for source in module.SOURCES} == used - {"errors"}
    for source in module.SOURCES:
        file = tmp_path / f"fusion/compiled/{source}.py"
        text = file.read_text()
        file.write_text(text + "#")
        assert module._name() != name
        file.write_text(text)
    assert module._name() == name


def test_a_loop_that_could_raise_is_not_built(monkeypatch):
    pytest.importorskip("numba")
    from fusion.compiled import build, registry

    types = build.types

    def sound(n):
        return n + 1

    def raises(n):
        if n > 7:
            raise ValueError("seven")
        return n

    def allocates(n):
        return len(np.zeros(n))

    for function, good in ((sound, True), (raises, False), (allocates, False)):
        loop = registry.Declared(registry.helper(function), (types.int64(types.int64),), False)
        monkeypatch.setattr(build, "LOOPS", {"kernels.it": loop})
        if good:
            code, functions = build.build()
            from fusion.compiled.library import Library
            assert Library(code, functions).kernels.it(4) == 5
            continue
        with pytest.raises(RuntimeError, match="needs"):
            build.build()


@pytest.mark.parametrize("wrong", [np.zeros(8), np.zeros((2, 4), np.float32), np.zeros(16, np.float32)[::2]])
def test_memory_that_a_loop_would_misread_is_refused(library, wrong):
    with pytest.raises(TypeError, match="are needed"):
        library.kernels.encode(wrong, 0, np.zeros(64, np.uint8))
