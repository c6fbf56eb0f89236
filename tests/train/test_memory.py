"""The allocator: after the call, a large block that was freed is used again without its pages being mapped anew."""

import subprocess
import sys

import pytest

CODE = """
import ctypes, resource
from everlong.train.memory import keep_freed_memory
asked = {asked} and keep_freed_memory() and keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = library.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(asked, [faults() for _ in range(3)][-1])
"""


def measure(asked):
    done = subprocess.run([sys.executable, "-c", CODE.format(asked=asked)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told, faults = done.stdout.split()
    return told == "True", int(faults)


def test_freed_memory_is_kept():
    kept, faults = measure(True)
    if not kept:
        pytest.skip("the C library here is not glibc, which alone has these settings")
    assert faults < 10
    assert measure(False)[1] > 10 * (faults + 1)
