"""The kernel of the linear scan: the laws of all kernels."""

import kernel_laws as laws
import pytest
import torch

from everlong.ops import linear_scan
from everlong.ops.native.linear_scan import _backward, _forward

PACKED = torch.tensor([0, 0, 3, 4, 40, 42, 42, 70])


def inputs(length, channels, dtype=torch.float32, batch=2, packed=None, complex=False):
    shape = (channels, 2) if complex else (channels,)
    gates = torch.rand(batch, length, *shape) * 1.2 - 0.2
    return {
        "a": (gates * 0.6 if complex else gates).to(dtype),
        "b": torch.randn(batch, length, *shape).to(dtype),
        "initial_state": torch.randn(batch if packed is None else len(packed) - 1, *shape),
        "cu_seqlens": packed,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("complex", [False, True])
@pytest.mark.parametrize("length", [0, 1, 2, 63, 65, 300])
@pytest.mark.parametrize("channels", [1, 16, 37])
def test_the_reference_is_met(length, channels, complex, dtype):
    laws.check(linear_scan, inputs(length, channels, dtype, complex=complex))


@pytest.mark.parametrize("complex", [False, True])
def test_packed_sequences(complex):
    laws.check(linear_scan, inputs(70, 5, batch=1, packed=PACKED, complex=complex))


@pytest.mark.parametrize("complex", [False, True])
def test_neither_threads_nor_repetition_change_a_bit(complex):
    laws.check_repeatable(linear_scan, inputs(100, 70, complex=complex))


def test_numbers_may_lie_anywhere():
    given = inputs(33, 19)
    apart = {name: x if x is None else laws.scattered(x) for name, x in given.items()}
    laws.check(linear_scan, apart)
    turned = given | {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("a", "b")}
    laws.check(linear_scan, turned)


def test_torch_knows_the_operators():
    a, b, state = (torch.rand(2, 9, 5).requires_grad_(), torch.rand(2, 9, 5).requires_grad_(), torch.rand(2, 5))
    torch.library.opcheck(_forward, (a, b, state, None, False))
    torch.library.opcheck(_backward, (a.detach(), b.detach(), state, None, a.detach(), state, False))


def test_bad_bounds_are_refused_before_the_kernel_runs():
    given = inputs(9, 5, batch=1, packed=torch.tensor([0, 12]))
    with pytest.raises(ValueError, match="must rise from 0 to T = 9"):
        linear_scan(**given, backend="native")
