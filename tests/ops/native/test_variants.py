"""The kernels keep their laws however they are built: under sanitizers, with narrower vectors, without OpenMP."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ops.native.compilers import CLANG, GCC, Compiler, require, shared_library

from everlong.ops.native import build

# Runs tests with the library that is the first argument in the place of this machine's own.
PROGRAM = """
import sys
from pathlib import Path
import pytest

class Plugin:
    def pytest_configure(self):
        from everlong.ops.native import build
        build.library_path = lambda: Path(sys.argv[1])

sys.exit(pytest.main(["-q", "-x", "-n", "0", *sys.argv[2:]], plugins=[Plugin()]))
"""
HERE = Path(__file__).parent
SANITIZERS = ("-O1", "-g1", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def keep_laws(folder: Path, compiler: Compiler, flags: tuple[str, ...], chosen: str, **environment: str) -> None:
    """Builds all kernels with these flags and runs those of their tests whose names match."""
    library = shared_library(
        compiler, sorted(build.SOURCES.glob("*.cpp")), folder / "kernels.so", (*build.FLAGS, *flags)
    )
    files = [str(path) for path in sorted(HERE.glob("test_*.py")) if "import kernel_laws" in path.read_text()]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(library), "-k", chosen, *files],
        env={**os.environ, **environment},
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


def test_sanitizers_find_nothing(tmp_path):
    require(GCC, SANITIZERS)
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    keep_laws(
        tmp_path,
        GCC,
        SANITIZERS,
        "packed or anywhere",
        LD_PRELOAD=found.stdout.strip(),
        ASAN_OPTIONS="detect_leaks=0",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "flags"),
    {
        "AVX2": (GCC, ("-O3", "-march=x86-64-v3", "-fopenmp")),
        "SSE": (GCC, ("-O2", "-march=x86-64", "-fopenmp")),
        "Clang": (CLANG, ("-O3", "-march=native", "-fopenmp")),
        "no OpenMP": (GCC, ("-O3", "-march=native", "-Wno-unknown-pragmas")),
    }.values(),
    ids=["AVX2", "SSE", "Clang", "no OpenMP"],
)
def test_other_builds(tmp_path, compiler, flags):
    require(compiler, flags)
    keep_laws(tmp_path, compiler, flags, "not compiled and not opcheck")
