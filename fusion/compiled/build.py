"""Machine code for this processor from the loops of `kernels`, `streams` and `guard`: most of a minute of one core, once.

numba turns each loop into a function that C could call: pointers, sizes and numbers. Their LLVM code is put together and
becomes one object file, which `library` loads in some hundredths of a second without numba.
"""

from __future__ import annotations

import llvmlite.binding as llvm
import numba
from numba import types

from fusion.compiled import guard, kernels, streams
from fusion.compiled.registry import LOOPS, OPTIONS, Declared

MODULES = (kernels, streams, guard)  # importing them declares their loops
_SYSTEM = {"abort", "free", "malloc", "memcpy", "memmove", "memset", "mmap", "pread", "sigaction", "sqrt"}


def build() -> tuple[bytes, list[dict]]:
    """The object file, and for each function in it `loop`, `symbol`, `arguments`, `result` and `of_rows`.

    An argument is [dtype, dimensions]; an array is handed over as its address and its sizes. RuntimeError for code that would
    call what is not there when it is loaded.
    """
    found, whole = [], llvm.parse_assembly("")
    for name, declared in LOOPS.items():
        for signature in declared.signatures:
            function = _callable(declared, signature)
            whole.link_in(llvm.parse_assembly(function.inspect_llvm()))
            found.append({"loop": name, "symbol": function.native_name, "result": str(signature.return_type),
                          "arguments": [_kind(argument) for argument in signature.args], "of_rows": declared.of_rows})
    _close(whole)
    return _machine().emit_object(whole), found


def _callable(declared: Declared, signature) -> object:
    """A loop as a function for C: an array is its address and its sizes."""
    names, calls, kinds = [], [], []
    for k, argument in enumerate(signature.args):
        sizes = [f"n{k}_{axis}" for axis in range(getattr(argument, "ndim", 0))]
        names += [f"a{k}", *sizes]
        calls.append(f"carray(a{k}, ({', '.join(sizes)},))" if sizes else f"a{k}")
        kinds += [types.CPointer(argument.dtype), *[types.int64] * len(sizes)] if sizes else [argument]
    code = f"def loop_for_c({', '.join(names)}):\n    return loop({', '.join(calls)})\n"
    space = {"loop": declared.loop, "carray": numba.carray}
    exec(code, space)  # of our own words: numba compiles functions of a fixed number of arguments only
    return numba.cfunc(signature.return_type(*kinds), nopython=True, **OPTIONS)(space["loop_for_c"])


def _kind(argument: types.Type) -> list:
    return [str(argument.dtype), argument.ndim] if isinstance(argument, types.Array) else [str(argument), 0]


def _close(module: llvm.ModuleRef) -> None:
    """Check that loops call the system only, and end the process where they would call numba.

    numba's frame around each of them reports what it raises and frees what it allocated; they do neither.
    """
    missing = {value.name for value in (*module.functions, *module.global_variables) if value.is_declaration}
    missing = {name for name in missing if not name.startswith("llvm.")} - _SYSTEM
    raising = {value.name for value in module.global_variables if value.name.startswith(".const.picklebuf")}
    for function in module.functions:
        if not function.name.startswith(("cfunc.", "NRT_")):
            used = {operand.name for block in function.blocks for step in block.instructions for operand in step.operands}
            if used & (missing | raising):
                raise RuntimeError(f"{function.name} needs {', '.join(sorted(used & (missing | raising)))}")
    missing = sorted(name for name in missing if not name.startswith(("Py", "_Py")))
    never = [f'define void @"{name}"() {{ call void @abort() unreachable }}' for name in missing]
    module.link_in(llvm.parse_assembly("\n".join(["declare void @abort()", *never])))


def _machine() -> llvm.TargetMachine:
    """For this very processor, with all that it can do."""
    features = llvm.get_host_cpu_features().flatten()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3, reloc="pic", codemodel="jitdefault", jit=True)
