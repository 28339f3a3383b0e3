"""What Python's bytecode does and names, without where it came from."""

from __future__ import annotations

import dis
import functools
import types
from typing import Any

#: What a closure's cell holds before its variable has a value.
EMPTY = "an empty cell"


@functools.cache
def tokens(code: types.CodeType) -> tuple[str, ...]:
    """Bytecode and constants, without places in files."""
    constants = []
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            constants.append(" ".join(tokens(constant)))
        elif isinstance(constant, frozenset):
            constants.append(repr(sorted(map(repr, constant))))
        else:
            constants.append(f"{type(constant).__name__} {constant!r}")
    signature = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    read = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    table = getattr(code, "co_exceptiontable", b"")
    return (code.co_code.hex(), table.hex(), repr(signature), repr(read), *constants)


@functools.cache
def names(code: types.CodeType) -> tuple[str, ...]:
    """Names that code, and the code within it, takes from its globals and from objects."""
    found = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found.update(dict.fromkeys(names(constant)))
    return tuple(found)


@functools.cache
def global_names(code: types.CodeType) -> tuple[str, ...]:
    """Names that code, and the code within it, takes from its globals alone."""
    loads = (i for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    found = dict.fromkeys(str(i.argval) for i in loads)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found.update(dict.fromkeys(global_names(constant)))
    return tuple(found)


def content(cell: types.CellType) -> Any:
    """Of a closure's cell."""
    try:
        return cell.cell_contents
    except ValueError:
        return EMPTY


@functools.cache
def words(code: types.CodeType) -> tuple[str, ...]:
    """Strings in code, and in the code within it, that could be names, as `getattr` takes them."""
    found: dict[str, None] = {}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found.update(dict.fromkeys(words(constant)))
        elif isinstance(constant, str) and constant.isidentifier():
            found[constant] = None
    return tuple(found)
