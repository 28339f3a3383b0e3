"""The ATen executor without a compiler: ORT runs its ATen nodes through ctypes callbacks.

Upstream ships the executor as C++ source (`torch_cpp_extensions/cpu/aten_op_executor`) that has to
be compiled against the installed torch. ONNX Runtime only wants the addresses of two C functions,
so two ctypes callbacks serve as well, at the same step time: an ATen node runs once or twice a
step (embedding and its gradient), and the work is done by torch either way.

A C callback can't raise. An exception inside one is kept, and the node's output is poisoned with
a data type that ONNX Runtime refuses, which ends the run at that very node. Whoever started the
run then calls :func:`raise_pending`, so the user gets the original exception and its traceback.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils import dlpack

_Function = TypeVar("_Function", bound=Callable[..., Any])

#: Of the nodes that torch runs.
ATEN_DOMAIN = "org.pytorch.aten"
_CAPSULE_NAME = b"dltensor"
_USED_CAPSULE_NAME = b"used_dltensor"

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_rename_capsule = ctypes.pythonapi.PyCapsule_SetName
_rename_capsule.restype = ctypes.c_int
_rename_capsule.argtypes = [ctypes.py_object, ctypes.c_char_p]


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


class _Argument(NamedTuple):
    name: str
    is_keyword: bool
    kind: str  # kind of the element type: "TensorType", "IntType", ...
    is_list: bool
    is_optional: bool
    default: Any


class _Operator(NamedTuple):
    overload: Any  # torch._ops.OpOverload
    arguments: tuple[_Argument, ...]
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


def _parse_argument(argument: torch.Argument) -> _Argument:
    kind = argument.real_type if hasattr(argument, "real_type") else argument.type
    is_optional = kind.kind() == "OptionalType"
    if is_optional:
        kind = kind.getElementType()
    is_list = kind.kind() == "ListType"
    if is_list:
        kind = kind.getElementType()
    default = argument.default_value if argument.has_default_value() else None
    return _Argument(argument.name, argument.kwarg_only, kind.kind(), is_list, is_optional, default)


@functools.cache
def _operator(name: bytes, overload: bytes) -> _Operator:
    namespace, _, short_name = name.decode().rpartition("::")
    packet = getattr(getattr(torch.ops, namespace or "aten"), short_name)
    op = getattr(packet, overload.decode() or "default")
    arguments = tuple(_parse_argument(argument) for argument in op._schema.arguments)
    returns = tuple(value.type.kind() for value in op._schema.returns)
    return _Operator(op, arguments, returns)


def _to_python(argument: _Argument, pointer: int | None) -> Any:
    """An ORT input as the operator's argument; takes ownership of the DLManagedTensor."""
    if not pointer:
        return None if argument.is_optional else argument.default
    tensor = torch._C._from_dlpack(_new_capsule(pointer, _CAPSULE_NAME, None))
    if argument.kind == "TensorType" and not argument.is_list:
        is_mask = tensor.dtype == torch.uint8 and argument.name in _MASKS
        return tensor.view(torch.bool) if is_mask else tensor
    if argument.kind not in _SCALARS:
        kind = "a list of tensors" if argument.kind == "TensorType" else f"kind {argument.kind}"
        raise TypeError(f"an ATen node can't pass argument {argument.name!r}, {kind}")
    convert = _SCALARS[argument.kind]
    values = tensor.reshape(-1).tolist()
    return [convert(value) for value in values] if argument.is_list else convert(values[0])


def _to_dlpack_pointer(value: Any) -> int | None:
    """A result as an address of a DLManagedTensor that ONNX Runtime will own."""
    if value is None:
        return None
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bool:  # see _MASKS
        tensor = tensor.view(torch.uint8)
    capsule = dlpack.to_dlpack(tensor)
    pointer = _capsule_pointer(capsule, _CAPSULE_NAME)
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


def _arguments(op: _Operator, pointers: list[int | None]) -> tuple[list[Any], dict[str, Any]]:
    """A node's inputs as the operator's positional and keyword arguments."""
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    errors: list[Exception] = []
    # Every input is converted, even after one failed: ownership passes with the call.
    for argument, pointer in zip(op.arguments, pointers, strict=False):
        try:
            value = _to_python(argument, pointer)
        except Exception as error:
            errors.append(error)
            continue
        if argument.is_keyword:
            keywords[argument.name] = value
        else:
            positional.append(value)
    if len(pointers) > len(op.arguments):
        errors.append(
            TypeError(
                f"{op.overload} takes {len(op.arguments)} arguments, and the ATen node passes "
                f"{len(pointers)}"
            )
        )
    if errors:
        raise errors[0]
    return positional, keywords


def operator_name(node: Any) -> str:
    """`MatMul`, or the torch operator that an ATen node runs."""
    if node.domain == ATEN_DOMAIN:
        return next(str(a.s.decode()) for a in node.attribute if a.name == "operator")
    return str(node.op_type)


def aten_node(operator: str, inputs: Sequence[str], outputs: Sequence[str], name: str) -> Any:
    """An onnx.NodeProto that torch runs.

    Args:
        operator: name in torch.ops, or one of :func:`direct`.
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


#: Functions of ours that an ATen node runs without torch's dispatcher, which costs more than a
#: small product: tensors in, a tensor or a tuple of them out.
_direct: dict[bytes, Callable[..., Any]] = {}


def direct(name: str) -> Callable[[_Function], _Function]:
    """Have ATen nodes whose operator has this name run the function.

    It takes tensors, None for an absent one, and returns a tensor or a tuple of them.
    """

    def keep(function: _Function) -> _Function:
        _direct[name.encode()] = function
        return function

    return keep


def _run_direct(function: Callable[..., Any], pointers: list[int | None]) -> Any:
    capsules = [
        None if pointer is None else _new_capsule(pointer, _CAPSULE_NAME, None)
        for pointer in pointers
    ]
    tensors = [None if capsule is None else torch._C._from_dlpack(capsule) for capsule in capsules]
    with torch.no_grad():
        return function(*tensors)


def _is_tensor_argument(name: bytes, overload: bytes, index: int, is_input: bool) -> bool:
    if name in _direct:
        return True
    try:
        op = _operator(name, overload)
        kind = op.arguments[index].kind if is_input else op.return_kinds[index]
        return kind == "TensorType"
    except BaseException as error:
        keep_error(error)
        return False


def _execute(
    name: bytes, overload: bytes, num_inputs: int, inputs: Any, num_outputs: int, outputs: Any
) -> None:
    pointers = [inputs[i] for i in range(num_inputs)]
    try:
        if name in _direct:
            results = _run_direct(_direct[name], pointers)
        else:
            op = _operator(name, overload)
            positional, keywords = _arguments(op, pointers)
            with torch.no_grad():
                results = op.overload(*positional, **keywords)
        if not isinstance(results, tuple | list):
            results = (results,)
        for i in range(num_outputs):
            outputs[i] = _to_dlpack_pointer(results[i])
    except BaseException as error:
        keep_error(error)
        for i in range(num_outputs):
            outputs[i] = _poisoned_pointer()


_IsTensorArgument = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_bool
)
_ExecuteOperator = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)
# Kept for the life of the process: ONNX Runtime holds their addresses.
_is_tensor_callback = _IsTensorArgument(_is_tensor_argument)
_execute_callback = _ExecuteOperator(_execute)


def _address(callback: Any) -> int:
    address = ctypes.cast(callback, ctypes.c_void_p).value
    assert address is not None
    return address


#: Stands in for upstream's compiled module `aten_op_executor`, with its two functions.
executor = SimpleNamespace(
    is_tensor_argument_address=lambda: _address(_is_tensor_callback),
    execute_aten_operator_address=lambda: _address(_execute_callback),
)
