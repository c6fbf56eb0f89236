"""How the kernels come to a machine: built once, by one process, or one warning and torch's own operators."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from everlong.ops.native import build

# Builds the kernels from few sources (the first argument), which takes a second; prints what became of it.
LOAD = """
import sys
from pathlib import Path
from everlong.ops.native import build
build.SOURCES = Path(sys.argv[1])
found = build.obstacle(try_it=True)
print(found or build.library().lanes_of_a_vector())
"""
USE = """
import torch
from everlong import ops
h, last = ops.linear_scan(torch.ones(1, 3, 2), torch.ones(1, 3, 2))
h, last = ops.linear_scan(torch.ones(1, 3, 2), torch.ones(1, 3, 2))
print(last.tolist(), ops.explain("linear_scan").backend)
"""


@pytest.fixture
def start(tmp_path):
    """Starts a Python process with a cache of kernels of its own."""
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in ("library.cpp", "parallel.h", "simd.h"):
        shutil.copy(build.SOURCES / name, sources)
    running = []

    def begin(program, **environment):
        settings = {**os.environ, "EVERLONG_CACHE": str(tmp_path / "cache"), **environment}
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", program, str(sources)],
                env=settings,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return running[-1]

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip(), err.strip()


def test_processes_at_once_build_it_once(start):
    found = [finish(process) for process in [start(LOAD) for _ in range(3)]]
    assert len({out for out, _ in found}) == 1
    assert found[0][0] in {"4", "8", "16"}
    assert sum("builds its kernels" in err for _, err in found) == 1


def test_a_killed_build_is_begun_again(start, tmp_path):
    first = start(LOAD)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").rglob("work/build.ninja")):
        assert time.monotonic() < deadline
        assert first.poll() is None, "it was done before it could be killed"
        time.sleep(0.002)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not list((tmp_path / "cache").glob("kernels/*/*.so"))
    out, err = finish(start(LOAD))
    assert out in {"4", "8", "16"}
    assert "builds its kernels" in err
    assert finish(start(LOAD)) == (out, "")


def test_other_flags_are_another_library(start, tmp_path):
    finish(start(LOAD))
    finish(start(LOAD, EVERLONG_MARCH="x86-64-v3" if build.platform.machine() == "x86_64" else "generic"))
    assert len(list((tmp_path / "cache").glob("kernels/*/*.so"))) == 2


@pytest.mark.parametrize(
    ("case", "told"),
    {
        "no such compiler": "there is no compiler `/nowhere/c++`, which CXX names: unset CXX",
        "a compiler that fails": "error: nothing works today",
        "no folder": "the kernels cannot be kept in",
    }.items(),
)
def test_without_kernels_torch_serves_after_one_warning(start, tmp_path, case, told):
    broken = tmp_path / "broken"
    fails = "case $* in *-c*) echo 'x.cpp:1:1: error: nothing works today' >&2; exit 1;; esac"
    broken.write_text(f'#!/bin/sh\n{fails}\nexec {build.compiler()} "$@"\n')
    broken.chmod(0o755)
    (tmp_path / "file").touch()
    settings = {
        "no such compiler": {"CXX": "/nowhere/c++"},
        "a compiler that fails": {"CXX": str(broken)},
        "no folder": {"EVERLONG_CACHE": str(tmp_path / "file")},
    }[case]
    out, err = finish(start(USE, **settings))
    assert out == "[[3.0, 3.0]] torch"
    assert told in err
    assert err.count("UserWarning") == 1


def test_importing_everlong_builds_and_loads_nothing(start, tmp_path):
    program = "import sys, everlong; print('everlong.ops.native.build' in sys.modules, 'ninja' in sys.modules)"
    assert finish(start(program)) == ("False False", "")
    assert not (tmp_path / "cache").exists()
