"""What happens when the system cannot give a page of a mapped file, because it became shorter or its disk failed.

The system sends a signal that would end the process. The handler here, machine code that needs neither the interpreter nor
memory, puts a page of zeros in that place and notes it in a table, where whoever reads the map looks afterwards. A place
that is in no map is left to who handled the signal before.

The table of int64: [count of entries, bytes of a page, addresses of what is done with other signals, the first time and from
then on], then an entry of [first address, address behind the last, lost] for each map.
"""

from __future__ import annotations

import signal

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fusion.compiled.memory import integers_at
from fusion.compiled.registry import compiled

HEAD, ENTRY = 4, 3  # words
_PROT_READ, _MAP_PRIVATE_FIXED_ANONYMOUS = 1, 0x32
_SIGBUS, _FAULT_ADDRESS = int(getattr(signal, "SIGBUS", 7)), 2  # the third word of what Linux says of a signal
_mmap = types.ExternalFunction("mmap", types.int64(types.int64, types.int64, types.int32, types.int32, types.int32, types.int64))
_sigaction = types.ExternalFunction("sigaction", types.int32(types.int32, types.int64, types.int64))


def _variable(builder):
    """A word of the machine code itself: nothing else can be found in a handler."""
    name, word = "fusechat_guarded", ir.IntType(64)
    if name not in builder.module.globals:
        variable = ir.GlobalVariable(builder.module, word, name)
        variable.linkage, variable.initializer = "internal", ir.Constant(word, 0)
    return builder.module.globals[name]


@intrinsic
def _keep(context, value):
    def generate(context, builder, signature, arguments):
        builder.store(arguments[0], _variable(builder))
        return context.get_dummy_value()
    return types.void(types.int64), generate


@intrinsic
def _kept(context):
    def generate(context, builder, signature, arguments):
        return builder.load(_variable(builder))
    return types.int64(), generate


@compiled(types.void(types.int32, types.int64, types.int64))
def guard(number, info, context):
    """The handler; called with number −1 it takes `info` for the address of the table."""
    if number < 0:
        _keep(info)
        return
    address, table = integers_at(info, _FAULT_ADDRESS + 1)[_FAULT_ADDRESS], _kept()
    head = integers_at(table, HEAD)
    entries = integers_at(table, HEAD + ENTRY * head[0])
    for entry in range(HEAD, len(entries), ENTRY):
        if entries[entry] <= address < entries[entry + 1]:
            entries[entry + 2] = 1  # first the note, then the page
            page = address - address % head[1]
            if _mmap(page, head[1], _PROT_READ, _MAP_PRIVATE_FIXED_ANONYMOUS, -1, 0) == page:
                return
            break
    others, head[2] = head[2], head[3]  # it may hand the signal back to this one
    _sigaction(_SIGBUS, others, 0)  # which then gets it, for the place is tried again
