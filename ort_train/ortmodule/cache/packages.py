"""Packages by how their code is described (described.py): followed, or known by its version."""

from __future__ import annotations

import functools
import sys
import sysconfig

#: Packages whose functions are followed, but whose own globals needn't be understood.
FOLLOWED = frozenset({"transformers", "peft"})
#: Packages that are known by their version.
KNOWN = frozenset(
    """
    accelerate bitsandbytes deepspeed huggingface_hub numpy onnx onnxruntime ort_train
    safetensors tokenizers torch torchvision triton typing_extensions
    """.split()  # noqa: SIM905
)
#: Of Python's library, what computes the same in every process.
PURE = frozenset(
    """
    __future__ abc builtins collections contextlib copy dataclasses enum functools inspect
    itertools logging math numbers operator re string textwrap types typing warnings
    """.split()  # noqa: SIM905
)


def package(name: str) -> str:
    """The top-level package of a module's name."""
    return name.partition(".")[0]


@functools.cache
def is_installed(top: str) -> bool:
    """Whether a package lies where pip puts it, and not in a folder of the user's."""
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    return any(file.startswith(f"{sysconfig.get_path(kind)}/") for kind in ("purelib", "platlib"))


def is_known(name: str) -> bool:
    """Whether a module is torch's, Python's, or of another package that is known by its version."""
    top = package(name)
    return top in KNOWN or top in sys.stdlib_module_names


def is_of_the_user(name: str) -> bool:
    """Whether a module is no library's."""
    top = package(name)
    return not (is_known(name) or top in FOLLOWED or is_installed(top))
