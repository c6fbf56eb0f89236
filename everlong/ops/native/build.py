"""Builds the kernels for this processor with the user's compiler, once, and loads them.

The library is kept in a folder whose name is made from all that it depends on: sources, flags, compiler, processor,
versions of torch and everlong. Processes that need it at once wait for the first to have built it. A build that was
interrupted leaves nothing that would be taken for a library.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from everlong.ops import dispatch

SOURCES = Path(__file__).parent / "kernels"
NAME = "everlong_kernels"
FLAGS = ("-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-DNDEBUG")
COMPILERS = ("c++", "g++", "clang++")


class Unavailable(Exception):
    """There are no kernels here; says why, and what would help."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}: {remedy}")
        self.reason, self.remedy = reason, remedy


def compiler() -> str:
    """The path of the C++ compiler: what the environment asks for, or the first of the usual ones.

    Raises:
        Unavailable: there is none.
    """
    if platform.system() == "Windows":
        raise Unavailable("the kernels are for Linux and macOS", "under Windows use WSL")
    asked = dispatch.asked_compiler()
    for name in (asked,) if asked else COMPILERS:
        if found := shutil.which(name):
            return found
    if asked:
        raise Unavailable(f"there is no compiler `{asked}`, which CXX names", "unset CXX, or name one that is there")
    remedy = {"Darwin": "xcode-select --install", "Linux": "apt install g++"}.get(platform.system(), "install g++")
    raise Unavailable("there is no C++ compiler", remedy)


def flags() -> tuple[str, ...]:
    """What the kernels are compiled with, by the processor's own instructions unless EVERLONG_MARCH names others."""
    machine = dispatch.asked_architecture() or "native"
    option = "-mcpu" if platform.machine() in {"arm64", "aarch64"} else "-march"
    return (*FLAGS, f"{option}={machine}")


def library_path() -> Path:
    """Where the library for this machine stands, or will."""
    state = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        state.update(source.name.encode() + b"\0" + source.read_bytes())
    program = Path(compiler()).resolve()
    parts = (*flags(), str(program), str(program.stat().st_mtime_ns), torch.__version__, _processor())
    state.update("\0".join(parts).encode())
    return dispatch.cache_folder() / "kernels" / state.hexdigest()[:16] / f"{NAME}.so"


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded kernels, built first where they are not yet.

    Raises:
        Unavailable: they cannot be built or loaded here.
    """
    path = library_path()
    if not path.is_file():
        build(path)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"the kernels cannot be loaded: {error}", f"remove {path.parent}") from error
    loaded.use_threads_of_torch.argtypes = (ctypes.c_void_p,)
    if (pool := _threads_of_torch()) is not None:
        loaded.use_threads_of_torch(pool)
    return loaded


def built() -> bool:
    """Whether the library for this machine is there; the first use of a kernel builds it."""
    try:
        return library_path().is_file()
    except Unavailable:
        return False


def obstacle(*, try_it: bool) -> Unavailable | None:
    """Why there are no kernels here, None where there are.

    `try_it` builds and loads them; without it, and where nobody has tried yet, a compiler is enough.
    """
    if try_it or _attempt.cache_info().currsize:
        return _attempt()
    try:
        library_path()
    except Unavailable as error:
        return error
    return None


@functools.cache
def _attempt() -> Unavailable | None:
    try:
        library()
    except Unavailable as error:
        return error
    return None


def build(path: Path) -> None:
    """Compiles all sources, in parallel, to the library `path`.

    Raises:
        Unavailable: the compiler fails, or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent / "lock"):
            if path.is_file():
                return
            work = path.parent / "work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            with _spinner():
                made = _compile(work)
            os.replace(made, path)
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        reason = f"the kernels cannot be kept in {path.parent}: {error.strerror or error}"
        raise Unavailable(reason, "name another folder in EVERLONG_CACHE") from error


# Run in a process of its own: the builder takes compiler and ninja from the environment, and imports setuptools.
_PROGRAM = """
import sys
from torch.utils import cpp_extension
name, folder, flags, *sources = sys.argv[1:]
cpp_extension.load(name, sources, extra_cflags=flags.split(), build_directory=folder, is_python_module=False)
"""


def _compile(work: Path) -> Path:
    """Runs torch's extension builder in the folder `work`."""
    import ninja

    sources = [str(source) for source in sorted(SOURCES.glob("*.cpp"))]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, NAME, str(work), " ".join(flags()), *sources],
        env=dispatch.environment(programs=ninja.BIN_DIR, compiler=compiler()),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        output = (done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
        first = next((line for line in output if ": error:" in line or ": fatal error:" in line), output[-1])
        remedy = "name another compiler in CXX (GCC 12 and Clang 14 are known to work)"
        raise Unavailable(f"the kernels cannot be built: {first.strip()}", remedy)
    return work / f"{NAME}.so"


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """No other process is in here at the same time; a lock whose owner died is free."""
    import fcntl

    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _spinner() -> Iterator[None]:
    """One line on the terminal's error stream while the compiler works."""
    from rich.console import Console

    console = Console(stderr=True)
    text = "everlong builds its kernels for this processor, once"
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        print(f"{text} ...", file=sys.stderr, flush=True)
        yield


def _threads_of_torch() -> ctypes.c_void_p | None:
    """torch's own loop over its threads; None in versions that do not offer it, where OpenMP or one thread serves."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).is_file():
            loaded = ctypes.CDLL(str(folder / name))
            if hasattr(loaded, "torch_parallel_for"):
                return ctypes.cast(loaded.torch_parallel_for, ctypes.c_void_p)
    return None


def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return f"{platform.machine()} {platform.processor()}"
    lines = info.read_text().split("\n\n", 1)[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
