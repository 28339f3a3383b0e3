"""What the exporter and ONNX Runtime report, in a sentence that a user can act on."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator

from ort_train.errors import OrtTrainError, UnsupportedModelError

#: Where reports name the operator, most telling first.
_OPERATOR_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        r"Exporting the operator '(?P<op>[\w:]+)'",
        r"unrecognized namespace (?P<op>\w+::\w+)",
        r"ONNX export of operator (?P<op>[\w:]+)",
        r"gradient builder has not been registered: (?P<op>[\w:.]+)",
        r"Could not find an implementation for (?P<op>[\w.]+)",
        r"while running (?P<op>\w+) node",
        r"In Node, \(\"[^\"]*\", (?P<op>\w+)",
        r"of operator \((?P<op>\w+)\)",
        r"node of type (?P<op>\w+)",
        r"operator (?P<op>aten::\w+)",
    )
)
# ONNX Runtime's own source locations, status codes and C++ signatures.
_NOISE = re.compile(
    r"^.*?\[ONNXRuntimeError\] : \d+ : \w+ : |/onnxruntime_src/\S+:\d+ .*? was false\. ", re.DOTALL
)
_LONGEST = 300
#: onnxruntime/core/framework/session_state.cc
_NO_KERNEL = "Could not find an implementation for"
#: torch/csrc/jit/frontend/tracer.cpp
_UNREGISTERED = "Cannot insert a Tensor that requires grad as a constant"


def explained(error: BaseException, who: str, is_float64: bool = False) -> OrtTrainError:
    """The error that a user gets where a module can't be exported, differentiated or run.

    Args:
        error: what was raised; to be chained with `raise ... from error`, which keeps all of it.
        who: the subject and predicate, "backend 'ort' can't train LlamaForCausalLM".
        is_float64: whether the module has parameters of that type.
    """
    if isinstance(error, OrtTrainError):
        return error
    everything = _chain(error, with_suppressed=True)
    ours = next((link for link in everything if isinstance(link, OrtTrainError)), None)
    if ours is not None:  # raised in the midst of an export, and wrapped by upstream
        return type(ours)(f"{who}: {ours}") if type(ours) is UnsupportedModelError else ours
    text = "\n".join(map(str, _chain(error)))
    if _UNREGISTERED in text:
        return UnsupportedModelError(
            f"{who}: its forward reads a tensor that requires a gradient and is neither a "
            "parameter nor an argument, so no graph can train it: make it an nn.Parameter, "
            "register the module that has it as a submodule, or detach it"
        )
    if is_float64 and _NO_KERNEL in text:
        return UnsupportedModelError(
            f"{who}: its parameters are float64, and ONNX Runtime has no kernels of that type for "
            "it: call module.float(), or train it with backend='compile' or 'eager'"
        )
    operator = next((m["op"] for p in _OPERATOR_PATTERNS if (m := p.search(text))), None)
    what = f"operator {operator}: " if operator else ""
    return UnsupportedModelError(
        f"{who}: {what}{_summary(error, text, operator)}. Train it with backend='compile' or "
        "'eager', or with backend='auto', which takes the fastest that can; a missing operator can "
        "be added in ort_train/ortmodule/export/symbolics.py"
    )


def _chain(error: BaseException, with_suppressed: bool = False) -> Iterator[BaseException]:
    """An error, what caused it, and what was being handled when it was raised.

    Args:
        with_suppressed: also where that was suppressed (`raise ... from None`).
    """
    seen: set[int] = set()
    links: list[BaseException | None] = [error]
    while links:
        link = links.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            yield link
            is_told = with_suppressed or not link.__suppress_context__
            links += [link.__cause__, link.__context__ if is_told else None]


def _summary(error: BaseException, text: str, operator: str | None) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    name = operator.split("::")[-1] if operator else ""
    # Lines of code in a quoted traceback have the name alone.
    told = (line for known in (operator, name) if known for line in lines if known in line)
    line = next(told, "")
    line = _NOISE.sub("", line or (lines[-1] if lines else "")).strip()
    if not line:
        frames = traceback.extract_tb(error.__traceback__)
        where = f" in {frames[-1].name} ({frames[-1].filename}:{frames[-1].lineno})"
        line = type(error).__name__ + (where if frames else "")
    return (line[: _LONGEST - 1] + "…" if len(line) > _LONGEST else line).rstrip(".")
