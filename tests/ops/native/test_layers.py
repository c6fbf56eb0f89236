"""The kernels around the operators: torch's expressions in float64, and their gradients."""

import kernel_laws as laws
import pytest
import torch
from torch.nn import functional as F

from everlong.nn import fused
from everlong.nn.layers import linear_cross_entropy, unit_heads
from everlong.ops import use_backend
from everlong.ops.native import layers

SHAPES = [(3, 2), (7, 16), (2, 5, 37), (2, 3, 4, 64), (0, 6)]


def rms_norm(x, weight):
    return fused.rms_norm(x, weight, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype):
    x = (3 * torch.randn(shape)).to(dtype)
    laws.check(rms_norm, {"x": x, "weight": torch.rand(shape[-1])})
    laws.check(rms_norm, {"x": x, "weight": None})
    if len(shape) > 2:
        laws.check(rms_norm, {"x": x, "weight": torch.rand(shape[-2:])})


def test_the_norm_of_heads_of_length_one():
    laws.check(unit_heads, {"x": torch.randn(2, 3, 4, 20)})
    with use_backend("native"):
        assert torch.equal(unit_heads(torch.zeros(1, 2, 3, 8)), torch.zeros(1, 2, 3, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape, dtype):
    gate, x = ((4 * torch.randn(shape)).to(dtype) for _ in range(2))
    laws.check(fused.swiglu, {"gate": gate, "x": x})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("size", [2, 12, 64])
def test_turn(size, rows, dtype):
    angles = 9 * torch.rand(rows, 5, 1, size // 2)

    def turn(x):
        return fused.turn(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))

    x = torch.randn(3, 5, 2, size).to(dtype)
    laws.check(turn, {"x": x})
    laws.check(turn, {"x": laws.scattered(x)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 5, 16, 300])
@pytest.mark.parametrize("with_bias", [False, True])
def test_cross_entropy_and_its_gradient(classes, with_bias, dtype):
    logits = (20 * torch.randn(9, classes)).to(dtype)
    bias = torch.randn(classes) if with_bias else None
    targets = torch.randint(classes, (9,))
    targets[4] = -1
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact if bias is None else exact + bias, targets, ignore_index=-1, reduction="none")
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    with use_backend("native"):
        loss = fused.cross_entropy_(logits, targets, bias)
    assert laws.error(loss, expected) <= 1e-5
    assert laws.error(logits, slope) <= laws.BOUND[dtype]


def test_a_loss_over_a_vocabulary_is_the_same_with_and_without_kernels():
    given = {"x": torch.randn(30, 24), "weight": torch.randn(50, 24), "bias": torch.randn(50)}
    targets = torch.randint(-1, 50, (30,))
    laws.check(lambda x, weight, bias: linear_cross_entropy(x, weight, targets, bias=bias), given)


def test_a_target_beyond_the_classes_is_refused():
    with pytest.raises(IndexError, match="below the 4 classes: got 4"):
        layers.cross_entropy_native(torch.zeros(2, 4), None, torch.tensor([1, 4]))


def test_neither_threads_nor_repetition_change_a_bit():
    laws.check_repeatable(rms_norm, {"x": torch.randn(201, 40), "weight": torch.rand(40)})
    laws.check_repeatable(fused.swiglu, {"gate": torch.randn(201, 40), "x": torch.randn(201, 40)})


def test_numbers_may_lie_anywhere():
    x, gate = laws.scattered(torch.randn(5, 7, 33)), torch.randn(33, 7, 5).permute(2, 1, 0)
    laws.check(rms_norm, {"x": x, "weight": torch.rand(33)})
    laws.check(fused.swiglu, {"gate": gate, "x": x})


def test_torch_knows_the_operators():
    x, weight, gate = (torch.randn(shape, requires_grad=True) for shape in ((3, 5), (5,), (3, 5)))
    torch.library.opcheck(torch.ops.everlong_native.rms_norm.default, (x, weight, 1e-5, torch.bfloat16))
    torch.library.opcheck(torch.ops.everlong_native.swiglu.default, (gate, x))
    heads, angles = torch.randn(2, 3, 4, 6, requires_grad=True), torch.randn(1, 3, 1, 3)
    torch.library.opcheck(torch.ops.everlong_native.turn.default, (heads, angles.cos(), angles.sin(), 1.0))
