"""The kernels compile without a warning wherever they are meant to run; test_variants.py runs what can run here."""

from dataclasses import dataclass

import pytest
from ops.native.compilers import ARM64, CLANG, GCC, Compiler, objects, require

from everlong.ops.native import build

SOURCES = sorted(build.SOURCES.glob("*.cpp"))


@dataclass(frozen=True)
class Target:
    """A compiler, and the flags after those that the kernels are always built with."""

    compiler: Compiler
    flags: tuple[str, ...]


TARGETS = {
    "AVX-512 and tiles": Target(GCC, ("-march=sapphirerapids", "-fopenmp")),
    "Clang, AVX2": Target(CLANG, ("-march=x86-64-v3", "-fopenmp")),
    "Clang, AVX-512 and tiles": Target(CLANG, ("-march=sapphirerapids", "-fopenmp")),
    "Clang, no OpenMP": Target(CLANG, ("-march=native", "-Wno-unknown-pragmas")),
    "arm64": Target(ARM64, ("-fopenmp",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_kernels_compile(tmp_path, name):
    target = TARGETS[name]
    openmp = "#include <omp.h>\n" if "-fopenmp" in target.flags else ""
    require(target.compiler, target.flags, f"{openmp}int main() {{}}\n")
    assert SOURCES
    # Less optimisation than users get: what is asked here does not depend on it, and it takes a third of the time.
    made = objects(target.compiler, SOURCES, tmp_path, (*build.FLAGS, "-O1", *target.flags))
    assert all(path.stat().st_size for path in made)
