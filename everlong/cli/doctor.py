"""Tells what this machine offers to everlong, what is wrong with it, and what helps."""

import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from everlong import __version__
from everlong.cli import console
from everlong.config import config
from everlong.ops import dispatch
from everlong.ops.dispatch import multiplies_bfloat16
from everlong.ops.native import build as native
from everlong.train.memory import keep_freed_memory

FLAGS = {
    "avx2": "avx2",
    "avx512": "avx512_f",
    "avx512_bf16": "avx512_bf16",
    "amx": "amx_tile",
    "amx_bf16": "amx_bf16",
}
GEMM = 1024  # rows and columns of the matrices that are multiplied
LEAST_MEMORY = 2 << 30


@config
class Arguments:
    """Tells what this machine offers to everlong, what is wrong with it, and what helps.

    Example: everlong doctor
    """

    build: bool = False
    """build the kernels for this processor now, instead of when they are first needed"""


def run(arguments: Arguments) -> dict[str, object]:
    """Examines the machine; problems come last, each with its remedy."""
    if arguments.build:
        native.obstacle(try_it=True)
    found: dict[str, Any] = {
        "processor": processor(),
        "memory": memory(),
        "torch": libraries(),
        "bf16": bfloat16_gain(),
        "compiler": compiler(),
        "kernels": kernels(),
        "backends": {name: backend(name) for name in dispatch.TABLE},
        "extras": extras(),
        "keeps_freed_memory": keep_freed_memory(),
    }
    found["problems"] = problems(found)
    _show(found)
    return found


def processor() -> dict[str, Any]:
    """The processor, its instructions, and the cores that this process may use."""
    capabilities = torch.cpu.get_capabilities()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return {
        "name": capabilities.get("cpu_name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "flags": {name: bool(capabilities.get(flag, False)) for name, flag in FLAGS.items()},
        "cores": psutil.cpu_count(logical=False),
        "hardware_threads": psutil.cpu_count(),
        "usable": min(usable, max(1, int(quota))) if quota else usable,
        "torch_threads": torch.get_num_threads(),
        "load": psutil.getloadavg()[0],
    }


def _quota() -> float | None:
    """The cores that a container grants, None where it grants all."""
    try:
        granted, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if granted == "max" else int(granted) / int(period)


def memory() -> dict[str, int]:
    """Bytes of memory: all there is (or a container grants), and what is free."""
    machine = psutil.virtual_memory()
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        limit = machine.total
    return {"total": min(machine.total, limit), "available": min(machine.available, limit)}


def libraries() -> dict[str, Any]:
    """Versions, and what torch was built to use."""
    return {
        "everlong": __version__,
        "python": platform.python_version(),
        "version": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def bfloat16_gain() -> dict[str, Any]:
    """How much faster a product of matrices is in bfloat16 than in float32: measured in turns, medians."""
    operands = {kind: torch.ones(GEMM, GEMM, dtype=kind) for kind in (torch.float32, torch.bfloat16)}
    times: dict[torch.dtype, list[float]] = {kind: [] for kind in operands}
    for _ in range(6):
        for kind, matrix in operands.items():
            began = time.perf_counter()
            matrix @ matrix
            times[kind].append(time.perf_counter() - began)
    single, half = (statistics.median(taken[1:]) for taken in times.values())  # the first of each prepares
    work = 2 * GEMM**3
    return {
        "instructions": multiplies_bfloat16("cpu"),
        "ratio": single / half,
        "float32_gflops": work / single / 1e9,
        "bf16_gflops": work / half / 1e9,
    }


def compiler() -> dict[str, Any]:
    """What torch.compile builds its kernels with."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    path = shutil.which(name)
    version = None
    if path:
        told = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
        version = told.partition("\n")[0] or None
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    return {"name": name, "path": path, "version": version, "python_headers": headers}


def kernels() -> dict[str, Any]:
    """The kernels of everlong: whether they are built, where, and why they cannot be."""
    missing = native.obstacle(try_it=native.built())
    return {
        "built": native.built(),
        "path": None if missing else str(native.library_path()),
        "missing": None if missing is None else {"reason": missing.reason, "remedy": missing.remedy},
    }


def backend(operator: str) -> dict[str, str]:
    """Which implementation "auto" takes for an operator here, and why."""
    choice = dispatch.explain(operator)
    return {"backend": choice.backend, "reason": choice.reason}


def extras() -> dict[str, dict[str, bool]]:
    """For each extra of everlong its packages, and whether they are installed."""
    there = {_normal(one.metadata["Name"]) for one in metadata.distributions()}
    found: dict[str, dict[str, bool]] = {}
    for requirement in metadata.requires("everlong") or ():
        matched = re.match(r"([\w.-]+).*extra == ['\"](\w+)['\"]", requirement)
        if matched and _normal(matched[1]) != "everlong" and matched[2] != "all":
            found.setdefault(matched[2], {})[matched[1]] = _normal(matched[1]) in there
    return found


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def problems(found: dict[str, Any]) -> list[dict[str, str]]:
    """What is wrong here, and what helps."""
    own = found["kernels"]["missing"]
    cpu, build, threads = found["processor"], found["compiler"], found["processor"]["torch_threads"]
    checks = [
        (
            cpu["architecture"] in {"x86_64", "AMD64"} and not cpu["flags"]["avx2"],
            "the processor has no AVX2, on which torch's fast paths rest",
            "use a newer machine, or expect everything to take several times as long",
        ),
        (
            threads < cpu["usable"] and threads < (cpu["cores"] or 1),
            f"torch uses {threads} of {cpu['usable']} cores",
            f"unset OMP_NUM_THREADS, or set it to {min(cpu['usable'], cpu['cores'] or cpu['usable'])}",
        ),
        (
            threads > cpu["usable"],
            f"torch uses {threads} threads where {cpu['usable']} cores are granted: they wait for each other",
            f"set OMP_NUM_THREADS={cpu['usable']}",
        ),
        (
            cpu["load"] > cpu["usable"] + 0.5,
            f"other work keeps the cores busy (load {cpu['load']:.1f} on {cpu['usable']} cores)",
            "end it before measuring or training",
        ),
        (
            found["memory"]["available"] < LEAST_MEMORY,
            f"only {console.size(found['memory']['available'])} of memory are free",
            "close other programs, or train with smaller --batch-tokens",
        ),
        (
            own is not None,
            f"everlong works without its kernels, several times slower: {own and own['reason']}",
            own and own["remedy"],
        ),
        (
            build["path"] is None,
            f"there is no C++ compiler `{build['name']}`, so torch.compile cannot work",
            "apt-get install g++ (or name another compiler in CXX), or train with --compile off",
        ),
        (
            build["path"] is not None and not build["python_headers"],
            "Python.h is missing, so torch.compile cannot work",
            "apt-get install python3-dev, or train with --compile off",
        ),
        (
            found["bf16"]["instructions"] and found["bf16"]["ratio"] < 1.2,
            f"bf16 is only {found['bf16']['ratio']:.1f} times as fast as float32 although the processor has it",
            "train with --precision float32, unless the machine was busy just now: run this again",
        ),
        (
            not found["keeps_freed_memory"] and sys.platform.startswith("linux"),
            "this C library is not glibc: large tensors are mapped afresh every time, which costs up to a quarter",
            "preload an allocator that keeps memory, such as jemalloc",
        ),
    ]
    return [{"problem": problem, "remedy": remedy} for applies, problem, remedy in checks if applies]


def _show(found: dict[str, Any]) -> None:
    cpu, lib, gain, build = found["processor"], found["torch"], found["bf16"], found["compiler"]
    flags = [name if has else f"no {name}" for name, has in cpu["flags"].items()]
    console.fields(
        {
            "processor": f"{cpu['name']} ({', '.join(flags)})",
            "cores": f"{cpu['cores']}, {cpu['usable']} usable, torch uses {cpu['torch_threads']} threads",
            "memory": f"{console.size(found['memory']['total'])}, "
            f"{console.size(found['memory']['available'])} available",
            "versions": f"everlong {lib['everlong']}, torch {lib['version']} ({lib['capability']}), "
            f"Python {lib['python']}",
            "GPU": lib["gpu"] or "none",
            "matrix products": f"float32 {gain['float32_gflops']:,.0f} GFLOP/s, bf16 {gain['bf16_gflops']:,.0f}: "
            f"{gain['ratio']:.1f} times as fast",
            "compiler": build["version"] or "none",
            "kernels": _kernels_row(found["kernels"]),
            "freed memory": "kept for the next step" if found["keeps_freed_memory"] else "goes back to the system",
        }
    )
    print()
    console.table(
        ["operator", "auto takes", "because it is"],
        [(name, choice["backend"], choice["reason"]) for name, choice in found["backends"].items()],
    )
    print()
    console.table(["optional extra", "state"], list(_extras_rows(found["extras"])))
    print()
    for item in found["problems"]:
        print(f"Problem: {item['problem']}. Remedy: {item['remedy']}.")
    if not found["problems"]:
        print("No problems found.")


def _kernels_row(found: dict[str, Any]) -> str:
    if found["missing"]:
        return "missing"
    return f"built, {found['path']}" if found["built"] else "will be built when first needed; --build does it now"


def _extras_rows(found: dict[str, dict[str, bool]]) -> Iterator[tuple[str, str]]:
    for extra, packages in found.items():
        missing = [name for name, there in packages.items() if not there]
        how = f"without {', '.join(missing)}: pip install 'everlong[{extra}]'"
        yield extra, how if missing else "installed"
