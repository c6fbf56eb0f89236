"""Calls a kernel: tensors and numbers become one block of 8-byte words (see kernels/arguments.h)."""

import functools
import struct
from array import array
from collections.abc import Callable

import torch
from torch import Tensor

from everlong.ops.native.build import library

# In the order of `enum class Type`; 0 is a tensor that is not there.
_TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.int64: 3, torch.int32: 4, torch.bool: 5}
_AXES = 4
_NOTHING = (0,) * (2 + _AXES)
_UNUSED = tuple((0,) * (_AXES - axes) for axes in range(_AXES + 1))


def call(kernel: str, *arguments: Tensor | float | None) -> None:
    """Runs `kernel` on tensors of up to four axes (or None), whole numbers and floats, in the order of its struct.

    Raises:
        MemoryError: there is no memory for intermediate results.
    """
    words = array("q")
    for argument in arguments:
        if argument is None:
            words.extend(_NOTHING)
        elif isinstance(argument, Tensor):
            stride = argument.stride()
            words.extend((argument.data_ptr(), _TYPES[argument.dtype], *stride, *_UNUSED[len(stride)]))
        elif isinstance(argument, int):
            words.append(argument)
        else:
            words.frombytes(struct.pack("d", argument))
    failed = _function(kernel)(words.buffer_info()[0], len(words))
    assert failed != 1, f"{kernel} takes other arguments than these {len(words)} words"
    if failed:
        raise MemoryError(f"no memory for the intermediate results of {kernel}")


@functools.cache
def _function(kernel: str) -> Callable[[int, int], int]:
    import ctypes

    function = getattr(library(), kernel)
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]
