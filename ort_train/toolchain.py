"""This machine's C++ compiler and Python headers; nothing is imported to look for them."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path


def find_compiler() -> list[str] | None:
    """The C++ compiler's command ($CXX, else the first found on the PATH), or None."""
    for candidate in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        command = shlex.split(candidate) if candidate else []
        if command and shutil.which(command[0]):
            return command
    return None


def missing_tool() -> str | None:
    """What a build of a C++ extension lacks, with the command that brings it, or None."""
    if find_compiler() is None:
        return "a C++ compiler is needed: apt-get install g++"
    include = sysconfig.get_paths()["include"]
    if not (Path(include) / "Python.h").is_file():
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        return f"Python's headers are needed in {include}: apt-get install python{version}-dev"
    return None
