"""Functions with a backward pass of their own: torch's plain expressions, and their gradients."""

import pytest
import torch
from torch.nn import functional as F

from everlong.nn.fused import rms_norm, turn
from everlong.nn.layers import InputNorm


def check(function, plain, inputs, **tolerance):
    ours, theirs = function(*inputs), plain(*inputs)
    weight = torch.randn_like(theirs)
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    for one, other in zip(
        (ours, *torch.autograd.grad((ours * weight).sum(), leaves)),
        (theirs, *torch.autograd.grad((theirs * weight).sum(), leaves)),
        strict=True,
    ):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("shape", [(7,), (2, 5, 12), (2, 3, 4, 1), (0, 6)])
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(shape, weighted):
    x = (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    weight = torch.rand(shape[-1], dtype=torch.float64).requires_grad_() if weighted else None
    near = {"atol": 1e-12, "rtol": 1e-12}
    check(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, shape[-1:], w, 1e-5), (x, weight), **near)
    if x.numel():
        leaves = (x, weight) if weighted else (x,)
        assert torch.autograd.gradcheck(lambda x, w=None: rms_norm(x, w, 1e-5), leaves)


def test_rms_norm_of_zeros_and_of_short_types():
    x = torch.zeros(2, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(rms_norm(x, None, 1e-5).sum(), x)
    torch.testing.assert_close(grad, torch.full_like(x, 1e5**0.5))
    y = torch.randn(64, 96).bfloat16()
    exact = F.rms_norm(y.double(), (96,), eps=1e-5)
    assert rms_norm(y, None, 1e-5).dtype == torch.bfloat16
    assert (rms_norm(y, None, 1e-5).double() - exact).norm() < 0.01 * exact.norm()


def test_the_norm_before_products_has_their_dtype():
    norm, x = InputNorm(16, eps=1e-5), torch.randn(2, 3, 16)
    assert norm(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
    assert norm.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("rows", [1, 3])
def test_turn(rows):
    x = torch.randn(3, 5, 2, 8, dtype=torch.float64, requires_grad=True)
    angles = 9 * torch.rand(rows, 5, 1, 4, dtype=torch.float64)

    def plain(x):
        pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    check(lambda x: turn(x, angles.cos(), angles.sin()), plain, (x,), atol=1e-12, rtol=1e-12)
