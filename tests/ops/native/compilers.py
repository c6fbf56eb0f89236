"""Finds C++ compilers, and compiles sources with them, several at a time, warnings being errors."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

WARNINGS = ("-Wall", "-Wextra", "-Werror")


@dataclass(frozen=True)
class Compiler:
    """A compiler by the name of its command, and what `apt-get install` takes to get it."""

    command: str
    packages: str


GCC = Compiler("g++", "g++")
CLANG = Compiler("clang++", "clang libomp-dev")
ARM64 = Compiler("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")


def require(compiler: Compiler, flags: Sequence[str] = (), program: str = "int main() {}\n") -> None:
    """Skips the test where the compiler is missing, or does not compile a program with these flags."""
    if shutil.which(compiler.command) is None:
        pytest.skip(f"no {compiler.command}: apt-get install {compiler.packages}")
    command = [compiler.command, "-x", "c++", *flags, "-c", "-", "-o", os.devnull]
    found = subprocess.run(command, input=program, text=True, capture_output=True)
    if found.returncode:
        reason = next((line for line in found.stderr.splitlines() if "error" in line), found.stderr.strip())
        pytest.skip(f"{compiler.command} {' '.join(flags)}: {reason} (apt-get install {compiler.packages})")


def run(command: Iterable[str | Path]) -> None:
    """Runs a command that must succeed; the assertion shows what it said."""
    done = subprocess.run([str(part) for part in command], text=True, capture_output=True)
    assert done.returncode == 0, f"{' '.join(done.args)}\n{done.stdout}{done.stderr}"


def objects(compiler: Compiler, sources: Iterable[Path], folder: Path, flags: Sequence[str] = ()) -> list[Path]:
    """Compiles sources to object files in a folder, as many at a time as there are processors.

    Returns: the object files, in the sources' order.
    Raises: AssertionError with the compiler's messages, at the first source that fails or is warned about.
    """
    sources = list(sources)
    targets = [folder / f"{source.stem}.o" for source in sources]

    def build(source: Path, target: Path) -> None:
        run([compiler.command, *WARNINGS, "-fPIC", *flags, "-c", source, "-o", target])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build, sources, targets))
    return targets


def shared_library(compiler: Compiler, sources: Iterable[Path], library: Path, flags: Sequence[str] = ()) -> Path:
    """Compiles sources and links them to a shared library. Returns: its path."""
    run([compiler.command, "-shared", *flags, *objects(compiler, sources, library.parent, flags), "-o", library])
    return library
