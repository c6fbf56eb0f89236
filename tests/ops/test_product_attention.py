"""Attention by products of blocks: equal to torch's plain attention wherever it is taken, gradients included."""

import pytest
import torch
from torch.nn import functional as F

from everlong.ops import product_attention as products
from everlong.ops import softmax_attention
from everlong.ops.fused_attention import _by_products
from everlong.ops.scoring import UNBOUNDED, Band

# queries, keys, heads, heads of keys, channels, values, reach to the left and to the right
CASES = {
    "causal": (65, 65, 4, 4, 16, 16, UNBOUNDED, 0),
    "longer than a block": (300, 300, 2, 2, 8, 8, UNBOUNDED, 0),
    "window": (300, 300, 2, 2, 8, 8, 40, 0),
    "window of one": (70, 70, 2, 2, 8, 8, 0, 0),
    "both directions": (70, 70, 2, 2, 8, 8, UNBOUNDED, UNBOUNDED),
    "both directions, window": (150, 150, 2, 2, 8, 8, 20, 20),
    "after a cache": (64, 200, 4, 4, 16, 16, UNBOUNDED, 0),
    "shared heads": (130, 130, 6, 2, 16, 16, UNBOUNDED, 0),
    "other width of values": (70, 70, 2, 1, 16, 24, 30, 0),
}


def plain(q, k, v, band):
    visible = band.visible(slice(0, q.shape[1]), slice(0, k.shape[1]), q.device)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), visible, enable_gqa=True)
    return o.transpose(1, 2)


def make(queries, keys, heads, shared, size, values):
    shapes = ((2, queries, heads, size), (2, keys, shared, size), (2, keys, shared, values))
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block", [1 << 21, 4096])
def test_it_is_attention(case, block, monkeypatch):
    """In float64, which shows every block and every edge; small blocks split heads, queries and keys."""
    monkeypatch.setattr(products, "BLOCK", block)
    *shape, left, right = CASES[case]
    inputs, band = make(*shape), Band(shape[1] - shape[0], left, right)
    expected = plain(*inputs, band)
    o = products.product_attention(*inputs, shape[4] ** -0.5, band.offset, left, right)
    weight = torch.randn_like(o)
    for one, other in zip(
        (o, *torch.autograd.grad((o * weight).sum(), inputs)),
        (expected, *torch.autograd.grad((expected * weight).sum(), inputs)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


MASKS = {"of all": (1, 65, 150), "of each row": (2, 65, 150), "of keys": (2, 1, 150), "of queries": (1, 65, 1)}


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("block", [1 << 21, 4096])
def test_under_a_mask_as_well(shape, block, monkeypatch):
    """Queries that see nothing among them: they give 0, and nothing of theirs is learned."""
    monkeypatch.setattr(products, "BLOCK", block)
    inputs, band = make(65, 150, 6, 2, 8, 8), Band(85, 40, UNBOUNDED)
    rows, queries, keys = MASKS[shape]
    mask = torch.rand(rows, 1, queries, keys) < 0.4
    mask[..., 7 if queries > 1 else 0, :] = False
    seen = mask & band.visible(slice(0, 65), slice(0, 150), mask.device)
    q, k, v = (x.transpose(1, 2) for x in inputs)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2)
    o = products.product_attention(*inputs, 8**-0.5, band.offset, band.left, band.right, mask)
    assert not o[~seen[:, 0].any(-1).expand(2, -1)].any()
    weight = torch.randn_like(o)
    for one, other in zip(
        (o, *torch.autograd.grad((o * weight).sum(), inputs)),
        (expected, *torch.autograd.grad((expected * weight).sum(), inputs)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_in_bfloat16_it_is_as_exact_as_its_inputs():
    inputs = [x.detach().bfloat16().requires_grad_() for x in make(300, 300, 4, 2, 32, 32)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected, o = plain(*exact, Band(0, UNBOUNDED, 0)), softmax_attention(*inputs)
    weight = torch.randn_like(expected)
    ours = (o, *torch.autograd.grad((o * weight.bfloat16()).sum(), inputs))
    theirs = (expected, *torch.autograd.grad((expected * weight).sum(), exact))
    for one, other in zip(ours, theirs, strict=True):
        assert (one.double() - other).norm() < torch.finfo(torch.bfloat16).eps * other.norm()


def test_what_comes_later_changes_nothing_before():
    q, k, v = (x.detach().bfloat16() for x in make(200, 200, 2, 2, 16, 16))
    before = products.product_attention(q, k, v, 0.25, 0, UNBOUNDED, 0)
    for x in (q, k, v):
        x[:, 131:] = torch.randn_like(x[:, 131:]) * 50
    after = products.product_attention(q, k, v, 0.25, 0, UNBOUNDED, 0)
    assert torch.equal(before[:, :131], after[:, :131])
    assert not torch.equal(before[:, 131:], after[:, 131:])


def test_rows_that_see_nothing_are_left_to_others():
    q = torch.zeros(1, 100, 1, 8, dtype=torch.bfloat16)
    assert not _by_products(q, Band(-10, UNBOUNDED, 0), 90)
    assert not _by_products(q, Band(0), 0)
    assert not _by_products(q[:, :8], Band(0, UNBOUNDED, 0), 8)
    assert not _by_products(q.float(), Band(0, UNBOUNDED, 0), 100)
