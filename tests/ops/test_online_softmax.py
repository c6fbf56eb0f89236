"""The steps of online softmax against torch.softmax, the tiles against torch's attention, and the laws of `merge`."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from everlong.ops.online_softmax import merge, one_pass_attention, online_softmax, safe_softmax, tiled_attention
from everlong.ops.scoring import Band, Scoring


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # On tensors as small as these, threads only wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def scores(*shape, size=1.0):
    x = size * torch.randn(*shape, dtype=torch.float64)
    return x.masked_fill(torch.rand(shape) < 0.2, -torch.inf)


@pytest.mark.parametrize("softmax", [safe_softmax, online_softmax])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_the_steps_are_softmax(softmax, size):
    x = scores(3, 4, 17, size=size)
    torch.testing.assert_close(softmax(x), torch.softmax(x, -1), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(softmax(torch.randn(3, 4, 1).double()), torch.ones(3, 4, 1, dtype=torch.float64))
    assert (softmax(torch.full((2, 5), -torch.inf)) == 0).all()
    assert softmax(torch.zeros(2, 0)).shape == (2, 0)


def test_one_pass_is_attention_over_the_keys_so_far():
    x, v = scores(3, 4, 9), torch.randn(3, 9, 5, dtype=torch.float64)
    x[0, 0, :4] = -torch.inf
    for count in (1, 2, 9):
        o, lse = one_pass_attention(x[..., :count].unbind(-1), v[:, :count, None].unbind(1))
        torch.testing.assert_close(lse, torch.logsumexp(x[..., :count], -1))
        torch.testing.assert_close(o, torch.softmax(x[..., :count], -1).nan_to_num(0.0) @ v[:, :count])


def test_one_pass_needs_a_key():
    with pytest.raises(ValueError, match="at least one key"):
        one_pass_attention([], [])


@pytest.mark.parametrize("query_block", [1, 16, 33, 256])
@pytest.mark.parametrize("key_block", [1, 16, 33, 256])
@pytest.mark.parametrize("band", [Band(16), Band(16, right=0), Band(16, left=20, right=0), Band(-10, right=0)], ids=str)
def test_any_size_of_tile(query_block, key_block, band):
    B, T, S, H, K, V = 2, 34, 50, 4, 3, 2
    q, k, v = (
        torch.randn(B, *shape, dtype=torch.float64, requires_grad=True) for shape in ((T, H, K), (S, 2, K), (S, 2, V))
    )
    bias = torch.randn(1, H, T, S, dtype=torch.float64, requires_grad=True)
    o, lse = tiled_attention(q, k, v, Scoring(0.5, band, bias=bias), query_block=query_block, key_block=key_block)
    distance = (torch.arange(T) + band.offset)[:, None] - torch.arange(S)
    added = bias.masked_fill((distance > band.left) | (-distance > band.right), -torch.inf)
    with sdpa_kernel(SDPBackend.MATH):
        heads = [x.transpose(1, 2) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))]
        expected = scaled_dot_product_attention(*heads, attn_mask=added, scale=0.5).transpose(1, 2)
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
    expected_lse = torch.logsumexp(0.5 * heads[0] @ heads[1].mT + added, -1).transpose(1, 2)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(o)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), (q, k, v, bias)) for x in (o, expected))
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("band", "tiles"), [(Band(0), 64), (Band(0, right=0), 36), (Band(0, left=15, right=0), 15), (Band(0, 15, 15), 22)]
)
def test_tiles_outside_the_band_are_not_visited(band, tiles):
    q, k, v = (torch.randn(1, 128, 1, 4, requires_grad=True) for _ in range(3))
    seen = set()

    def bias(queries, keys):
        seen.add((int(queries[0]) // 16, int(keys[0]) // 16))
        return torch.zeros(len(queries), len(keys))

    o, _ = tiled_attention(q, k, v, Scoring(1.0, band, bias=bias), query_block=16, key_block=16)
    visited = len(seen) - (0 if (0, 0) in seen else 1)
    seen.clear()
    o.sum().backward()
    assert abs(visited - tiles) <= 1
    assert abs(len(seen) - tiles) <= 1


def partials(*rows):
    o, lse = torch.randn(*rows, 5, dtype=torch.float64), 30 * torch.randn(*rows, dtype=torch.float64)
    empty = torch.rand(rows) < 0.3
    return o.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)


def test_merge_is_commutative_and_associative_with_a_neutral_element():
    a, b, c = (partials(6, 7, 3) for _ in range(3))
    nothing = torch.zeros_like(a[0]), torch.full_like(a[1], -torch.inf)
    for left, right in (
        (merge(*a, *b), merge(*b, *a)),
        (merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c))),
        (merge(*a, *nothing), a),
        (merge(*nothing, *a), a),
        (merge(*nothing, *nothing), nothing),
    ):
        torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-13)


def test_merge_of_the_parts_is_the_whole():
    q, k, v = (torch.randn(2, 9, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def over(keys, offset):
        return tiled_attention(q, k[:, keys], v[:, keys], Scoring(0.5, Band(offset, right=0)))

    # The later keys are invisible to the early queries: their part is empty there.
    whole, parts = over(slice(None), 0), merge(*over(slice(0, 4), 0), *over(slice(4, 9), -4))
    torch.testing.assert_close(parts, whole)
    ours, theirs = (torch.autograd.grad(o.square().sum() + lse.sum(), (q, k, v)) for o, lse in (parts, whole))
    torch.testing.assert_close(ours, theirs)


def test_merge_of_empty_rows_has_zero_gradients():
    inputs = [x.requires_grad_() for x in (*partials(8), *partials(8))]
    o, lse = merge(*inputs)
    for gradient in torch.autograd.grad(o.sum() + lse[lse.isfinite()].sum(), inputs):
        assert gradient.isfinite().all()


def test_merge_keeps_the_dtype_of_the_outputs():
    o, lse = torch.randn(3, 4, dtype=torch.bfloat16), torch.randn(3)
    merged, sums = merge(o, lse, o, lse)
    assert (merged.dtype, sums.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(merged, o)
