"""What the tests of native code share."""

import platform
import sys
from pathlib import Path

import pytest
from ops.native import compilers

TILES = "#include <immintrin.h>\nvoid probe() { _tile_zero(0); _tile_dpbf16ps(0, 1, 2); }\n"


@pytest.fixture(scope="session")
def amx_emulator(tmp_path_factory) -> Path:
    """The library that executes tile instructions in software; amx_emulator.cpp says how it is loaded.

    Load it in a process of the test's own (`LD_PRELOAD`): here, every kernel that is loaded later would use it.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("tile instructions are emulated on x86-64 Linux only")
    compilers.require(compilers.GCC, ("-mamx-tile", "-mamx-bf16"), TILES)
    library = tmp_path_factory.mktemp("amx") / "amx_emulator.so"
    source = Path(__file__).with_name("amx_emulator.cpp")
    flags = ("-std=c++17", "-O2", "-march=native", "-Wpedantic", "-Wconversion")
    return compilers.shared_library(compilers.GCC, [source], library, flags)
