"""The ATen executor without a compiler: ORT runs its ATen nodes through ctypes callbacks.

Upstream ships the executor as C++ source (`torch_cpp_extensions/cpu/aten_op_executor`) that has to
be compiled against the installed torch. ONNX Runtime only wants the addresses of two C functions,
so two ctypes callbacks serve as well: the work is done by torch either way.

A C callback can't raise. An exception inside one is kept, and the node's output is poisoned with
a data type that ONNX Runtime refuses, which ends the run at that very node. Whoever started the
run then calls :func:`raise_pending`, so the user gets the original exception and its traceback.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from ort_train.ortmodule.kernels import direct

#: Of the nodes that torch runs.
ATEN_DOMAIN = "org.pytorch.aten"
#: At the end of the name of an operator of ours that hands on bf16, where another hands on fp32.
BF16_SUFFIX = "_in_bf16"

# As objects of ctypes, which a call passes on as they are.
_CAPSULE_NAME = ctypes.c_char_p(b"dltensor")
_USED_CAPSULE_NAME = ctypes.c_char_p(b"used_dltensor")

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_rename_capsule = ctypes.pythonapi.PyCapsule_SetName
_rename_capsule.restype = ctypes.c_int
_rename_capsule.argtypes = [ctypes.py_object, ctypes.c_char_p]
_from_dlpack = torch._C._from_dlpack
_to_dlpack = torch._C._to_dlpack


class _DLTensor(ctypes.Structure):
    """The head of DLManagedTensor (dlpack.h), as far as the data type."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
    ]


# No DLDataTypeCode has this value, so ONNX Runtime's DlpackToOrtValue refuses the tensor.
_POISON_DTYPE_CODE = 255


class _Operator(NamedTuple):
    overload: Callable[..., Any]  # torch._ops.OpOverload
    #: Name where it is a keyword, and what makes the argument of an input's address, which is None
    #: for an absent one.
    arguments: tuple[tuple[str | None, Callable[[int | None], Any]], ...]
    are_tensors: tuple[bool, ...]
    return_kinds: tuple[str, ...]


# ORT's DLPack knows bool only as uint8. Arguments of these names are never numbers of eight bits.
_MASKS = frozenset({"mask", "condition", "attn_mask", "attn_bias", "key_padding_mask"})
_SCALARS: dict[str, Any] = {
    "IntType": int,
    "SymIntType": int,
    "FloatType": float,
    "BoolType": bool,
    "NumberType": lambda value: value,
    "ScalarTypeType": int,
}


def _tensor(pointer: int) -> torch.Tensor:
    """An ORT input; takes ownership of the DLManagedTensor."""
    tensor: torch.Tensor = _from_dlpack(_new_capsule(pointer, _CAPSULE_NAME, None))
    return tensor


def _converter(argument: torch.Argument) -> tuple[bool, Callable[[int | None], Any]]:
    """Whether an operator's argument is a tensor or tensors, and what makes it of an ORT input.

    Ownership of the DLManagedTensor passes with the call.
    """
    kind = argument.real_type if hasattr(argument, "real_type") else argument.type
    is_optional = kind.kind() == "OptionalType"
    if is_optional:
        kind = kind.getElementType()
    is_list = kind.kind() == "ListType"
    if is_list:
        kind = kind.getElementType()
    has_default = not is_optional and argument.has_default_value()
    absent = argument.default_value if has_default else None
    name, is_tensor = argument.name, kind.kind() == "TensorType"

    def tensor(pointer: int | None) -> Any:
        return _tensor(pointer) if pointer else absent

    def mask(pointer: int | None) -> Any:
        if not pointer:
            return absent
        value = _tensor(pointer)
        return value.view(torch.bool) if value.dtype == torch.uint8 else value

    def refused(pointer: int | None) -> Any:
        if not pointer:
            return absent
        _tensor(pointer)
        what = "a list of tensors" if is_tensor else f"kind {kind.kind()}"
        raise TypeError(f"an ATen node can't pass argument {name!r}, {what}")

    convert = _SCALARS.get(kind.kind(), refused)

    def number(pointer: int | None) -> Any:
        return convert(_tensor(pointer).item()) if pointer else absent

    def numbers(pointer: int | None) -> Any:
        if not pointer:
            return absent
        return [convert(value) for value in _tensor(pointer).reshape(-1).tolist()]

    if is_tensor and not is_list:
        return is_tensor, mask if name in _MASKS else tensor
    if convert is refused:
        return is_tensor, refused
    return is_tensor, numbers if is_list else number


@functools.cache
def _operator(name: bytes, overload: bytes) -> _Operator:
    namespace, _, short_name = name.decode().rpartition("::")
    packet = getattr(getattr(torch.ops, namespace or "aten"), short_name)
    op = getattr(packet, overload.decode() or "default")
    converters = [_converter(argument) for argument in op._schema.arguments]
    names = [argument.name if argument.kwarg_only else None for argument in op._schema.arguments]
    return _Operator(
        op,
        tuple(zip(names, (convert for _, convert in converters), strict=True)),
        tuple(is_tensor for is_tensor, _ in converters),
        tuple(value.type.kind() for value in op._schema.returns),
    )


def _to_dlpack_pointer(value: Any) -> int | None:
    """A result as an address of a DLManagedTensor that ONNX Runtime will own."""
    if value is None:
        return None
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bool:  # see _MASKS
        tensor = tensor.view(torch.uint8)
    capsule = _to_dlpack(tensor)
    pointer: int = _capsule_pointer(capsule, _CAPSULE_NAME)
    _rename_capsule(capsule, _USED_CAPSULE_NAME)
    return pointer


def _poisoned_pointer() -> int:
    pointer = _to_dlpack_pointer(torch.zeros(1))
    assert pointer is not None
    ctypes.cast(pointer, ctypes.POINTER(_DLTensor)).contents.dtype_code = _POISON_DTYPE_CODE
    return pointer


_pending: list[BaseException] = []
_pending_lock = threading.Lock()


def keep_error(error: BaseException) -> None:
    with _pending_lock:
        _pending.append(error)


def raise_pending(cause: BaseException | None = None) -> None:
    """Raise the first exception that a callback kept since the last call, if there is one.

    Args:
        cause: what ONNX Runtime reported; it is only a shadow of the kept exception and is
            dropped from the traceback.
    """
    with _pending_lock:
        errors, _pending[:] = list(_pending), []
    if errors:
        del cause
        raise errors[0] from None


def operator_name(node: Any) -> str:
    """`MatMul`, or the torch operator that an ATen node runs."""
    if node.domain == ATEN_DOMAIN:
        return next(str(a.s.decode()) for a in node.attribute if a.name == "operator")
    return str(node.op_type)


def rename_operator(node: Any, name: str) -> None:
    """Have an ATen node run another operator of torch's."""
    next(a for a in node.attribute if a.name == "operator").s = name.encode()


def aten_node(operator: str, inputs: Sequence[str], outputs: Sequence[str], name: str) -> Any:
    """An onnx.NodeProto that torch runs.

    Args:
        operator: name in torch.ops, or one of direct.py.
        inputs: its arguments, in order.
        outputs: what it returns.
        name: of the node.
    """
    from onnx import helper

    return helper.make_node(
        "ATen",
        inputs,
        outputs,
        name=name,
        domain=ATEN_DOMAIN,
        operator=operator,
        overload_name="",
    )


def _run_direct(function: Callable[..., Any], pointers: Sequence[int | None]) -> Any:
    remaining = iter(pointers)
    try:
        tensors = [
            _from_dlpack(_new_capsule(pointer, _CAPSULE_NAME, None)) if pointer else None
            for pointer in remaining
        ]
    except BaseException:
        _drop(remaining)
        raise
    return function(*tensors)


def _run_operator(op: _Operator, pointers: Sequence[int | None]) -> Any:
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    remaining = iter(pointers)
    try:
        for (keyword, convert), pointer in zip(op.arguments, remaining, strict=False):
            if keyword is None:
                positional.append(convert(pointer))
            else:
                keywords[keyword] = convert(pointer)
        if len(pointers) > len(op.arguments):
            raise TypeError(
                f"{op.overload} takes {len(op.arguments)} arguments, and the ATen node passes "
                f"{len(pointers)}"
            )
    except BaseException:
        _drop(remaining)
        raise
    return op.overload(*positional, **keywords)


def _drop(pointers: Iterable[int | None]) -> None:
    """Free inputs that nobody converted, as ownership passes with the call."""
    for pointer in pointers:
        if pointer:
            with contextlib.suppress(Exception):
                _tensor(pointer)


def _is_tensor_argument(name: bytes, overload: bytes, index: int, is_input: bool) -> bool:
    try:
        if direct.find(name) is not None:
            return not (is_input and index in direct.numbers_of(name))
        op = _operator(name, overload)
        return op.are_tensors[index] if is_input else op.return_kinds[index] == "TensorType"
    except BaseException as error:
        keep_error(error)
        return False


@functools.cache
def _addresses(count: int) -> Any:
    """The C type of an array of so many addresses."""
    return ctypes.c_void_p * count


def _results(name: bytes, overload: bytes, pointers: Sequence[int | None]) -> Any:
    try:
        function = direct.find(name)
        op = _operator(name, overload) if function is None else None
    except BaseException:
        _drop(pointers)
        raise
    if function is not None:
        return _run_direct(function, pointers)
    assert op is not None
    return _run_operator(op, pointers)


def _execute(
    name: bytes,
    overload: bytes,
    num_inputs: int,
    inputs: int | None,
    num_outputs: int,
    outputs: int,
) -> None:
    """Run a node.

    In a step as short as 50 ms most of this isn't in the processor's cache, where each call takes
    several times as long as in a loop: hence few of them.

    Args:
        inputs: address of as many addresses.
        outputs: address of as many addresses, which are written.
    """
    results = _addresses(num_outputs).from_address(outputs)
    try:
        pointers = _addresses(num_inputs).from_address(inputs)[:] if inputs else []
        if torch.is_grad_enabled():  # it isn't in ORTModule's passes
            with torch.no_grad():
                values = _results(name, overload, pointers)
        else:
            values = _results(name, overload, pointers)
        if not isinstance(values, (tuple, list)):
            values = (values,)
        for i in range(num_outputs):
            results[i] = _to_dlpack_pointer(values[i])
    except BaseException as error:
        keep_error(error)
        for i in range(num_outputs):
            results[i] = _poisoned_pointer()


_IsTensorArgument = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_bool
)
_ExecuteOperator = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
)
# Kept for the life of the process: ONNX Runtime holds their addresses.
_is_tensor_callback = _IsTensorArgument(_is_tensor_argument)
_execute_callback = _ExecuteOperator(_execute)


def address_of(callback: Any) -> int:
    """Of a ctypes callback, as a number."""
    address = ctypes.cast(callback, ctypes.c_void_p).value
    assert address is not None
    return address


#: Stands in for upstream's compiled module `aten_op_executor`, with its two functions.
executor = SimpleNamespace(
    is_tensor_argument_address=lambda: address_of(_is_tensor_callback),
    execute_aten_operator_address=lambda: address_of(_execute_callback),
)
