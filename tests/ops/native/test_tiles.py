"""Products of bfloat16 numbers, by each of their leaves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ops.native.compilers import GCC, require, run

from everlong.ops.native import build

HERE = Path(__file__).parent
AMX = ("-march=native", "-mamx-tile", "-mamx-bf16")
LEAVES = {"the processor's own": ("-march=native",), "AVX2": ("-march=x86-64-v3",), "any": ()}


def outcome(folder: Path, flags: tuple[str, ...], **environment: str) -> str:
    require(GCC, flags)
    program = folder / "program"
    run(
        [
            GCC.command,
            *build.FLAGS,
            "-Wall",
            "-Wextra",
            *flags,
            f"-I{build.SOURCES}",
            HERE / "tiles_program.cpp",
            "-o",
            program,
        ]
    )
    done = subprocess.run([program], env={**os.environ, **environment}, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", LEAVES)
def test_products_and_packing(tmp_path, name):
    outcome(tmp_path, LEAVES[name])


def test_tiles(tmp_path, amx_emulator):
    assert outcome(tmp_path, AMX, LD_PRELOAD=str(amx_emulator)) == "tiles"


def test_without_the_permission_to_use_tiles_the_next_leaf_serves(tmp_path):
    outcome(tmp_path, AMX)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear_attention_bf16"])
def test_kernels_keep_their_laws_on_tiles(tmp_path, amx_emulator, name):
    """The tests of a kernel, with its products on tiles."""
    environment = {"EVERLONG_MARCH": " ".join(AMX).removeprefix("-march="), "EVERLONG_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(HERE / f"test_{name}.py")]
    done = subprocess.run(
        command,
        env={**os.environ, **environment, "LD_PRELOAD": str(amx_emulator)},
        cwd=HERE.parents[2],
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
