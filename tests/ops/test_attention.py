"""Softmax attention against torch's own, in float64 and through its plainest path; then the laws that it keeps."""

import inspect
import itertools
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from everlong.ops.attention import softmax_attention

FORMS = ["auto", "parallel", "chunk", "recurrent"]
EVERY = [{"form": form, "backend": "torch"} for form in FORMS] + [{"backend": "reference"}]
LENGTHS = [1, 7, 64, 65, 130]

every_form = pytest.mark.parametrize("form", FORMS)
every_way = pytest.mark.parametrize("way", EVERY, ids=lambda way: way.get("form", "reference"))
both_directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # On tensors as small as these, threads only wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(B, T, S, H=2, Hkv=None, K=8, V=5, dtype=torch.float64):
    shapes = (B, T, H, K), (B, S, Hkv or H, K), (B, S, Hkv or H, V)
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


def by_torch(q, k, v, allowed=None, scale=None):
    """torch's attention as a chain of plain operators, heads repeated, without a fused kernel."""
    shared = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(shared, 2) for x in (k, v))
    with sdpa_kernel(SDPBackend.MATH):
        o = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=allowed, scale=scale)
    return o.transpose(1, 2)


def lse_by_torch(q, k, added, scale=None):
    x = torch.einsum("bihk,bjhk->bhij", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2))
    return torch.logsumexp(x * (scale or q.shape[-1] ** -0.5) + added, -1).transpose(1, 2)


def in_band(T, S, causal, window):
    """The definition of the band as a mask, queries aligned with the end of the keys."""
    distance = (torch.arange(T) + S - T)[:, None] - torch.arange(S)
    allowed = distance >= 0 if causal else torch.ones(T, S, dtype=torch.bool)
    return allowed if window is None else allowed & (distance < window) & (distance > -window)


def same(found, expected, inputs, tolerance=1e-10):
    """The outputs and the gradients of all inputs agree."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    weights = torch.randn_like(expected)
    gradients = (torch.autograd.grad((x * weights).sum(), inputs, retain_graph=True) for x in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@every_form
@both_directions
@pytest.mark.parametrize("T", LENGTHS)
def test_equals_torch_at_every_length(form, causal, T):
    for S in LENGTHS:
        qkv = inputs(2, T, S)
        # torch's own alignment at the end serves S >= T only.
        lower_right = causal_lower_right(T, S) if S >= T else in_band(T, S, True, None)
        expected = by_torch(*qkv, lower_right if causal else None)
        same(softmax_attention(*qkv, causal=causal, form=form), expected, qkv)


@every_way
@both_directions
@pytest.mark.parametrize("window", [1, 3, 100])
def test_windows(way, causal, window):
    for T, S in ((9, 9), (3, 12), (12, 5)):
        qkv = inputs(2, T, S, H=4, Hkv=2)
        expected = by_torch(*qkv, in_band(T, S, causal, window))
        same(softmax_attention(*qkv, causal=causal, window=window, **way), expected, qkv)


@both_directions
@pytest.mark.parametrize("window", [1, 5, 40, 64, 150])
@pytest.mark.parametrize(("T", "S"), [(330, 330), (200, 330), (330, 290)])
def test_windows_in_bands(causal, window, T, S):
    qkv = inputs(2, T, S, H=2, Hkv=1)
    same(softmax_attention(*qkv, causal=causal, window=window), by_torch(*qkv, in_band(T, S, causal, window)), qkv)
    with torch.no_grad():
        o, lse = softmax_attention(*qkv, causal=causal, window=window, return_lse=True)
        chunked, expected = softmax_attention(*qkv, causal=causal, window=window, return_lse=True, form="chunk")
    torch.testing.assert_close(o, chunked)
    torch.testing.assert_close(lse, expected)


@every_way
@both_directions
@pytest.mark.parametrize("shape", [(2, 4, 9, 11), (2, 1, 9, 11), (2, 1, 1, 11), (9, 11), (4, 9, 1), (11,)], ids=str)
def test_masks(way, causal, shape):
    qkv, mask = inputs(2, 9, 11, H=4, Hkv=2), torch.rand(shape) > 0.4
    allowed = mask & in_band(9, 11, causal, None)
    same(softmax_attention(*qkv, causal=causal, mask=mask, **way), by_torch(*qkv, allowed), qkv)


@every_way
@pytest.mark.parametrize("shape", [(2, 4, 9, 11), (4, 9, 11), (1, 4, 1, 11), (2, 1, 9, 1), (9, 11)], ids=str)
@pytest.mark.parametrize("window", [None, 4])
def test_bias_and_its_gradient(way, shape, window):
    qkv, bias = inputs(2, 9, 11, H=4, Hkv=2), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    added = bias.expand(2, 4, 9, 11).masked_fill(~in_band(9, 11, True, window), -torch.inf)
    found = softmax_attention(*qkv, window=window, bias=bias, **way)
    same(found, by_torch(*qkv, added), (*qkv, bias))
    frozen = softmax_attention(*qkv, window=window, bias=bias.detach(), **way)
    same(frozen, by_torch(*qkv, added.detach()), qkv)


def test_bias_gradient_over_many_tiles():
    qkv, bias = inputs(2, 300, 300), torch.randn(2, 300, 300, dtype=torch.float64, requires_grad=True)
    added = bias.masked_fill(~in_band(300, 300, True, None), -torch.inf)
    same(softmax_attention(*qkv, bias=bias), by_torch(*qkv, added), (*qkv, bias))


@every_way
@both_directions
def test_bias_as_a_function_of_positions(way, causal):
    T, S = 9, 13
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=torch.float64, requires_grad=True)

    def bias(queries, keys):
        return -slopes[:, None, None] * (queries[:, None] - keys).abs()

    qkv = inputs(2, T, S, H=4, Hkv=2)
    added = bias(torch.arange(T) + S - T, torch.arange(S)).masked_fill(~in_band(T, S, causal, None), -torch.inf)
    same(softmax_attention(*qkv, causal=causal, bias=bias, **way), by_torch(*qkv, added), (*qkv, slopes))
    with torch.no_grad():
        found = softmax_attention(*qkv, causal=causal, bias=bias, **way)
    torch.testing.assert_close(found, by_torch(*qkv, added))


@every_form
@pytest.mark.parametrize("window", [None, 30])
def test_bias_functions_on_long_inputs(form, window):
    qkv, slopes = inputs(1, 300, 300), torch.tensor([0.5, 0.1], dtype=torch.float64)
    distance = torch.arange(300)[:, None] - torch.arange(300)
    added = (-slopes[:, None, None] * distance).masked_fill(~in_band(300, 300, True, window), -torch.inf)
    found = softmax_attention(
        *qkv, window=window, bias=lambda i, j: -slopes[:, None, None] * (i[:, None] - j), form=form
    )
    same(found, by_torch(*qkv, added), qkv)


@every_way
def test_every_option_at_once(way):
    qkv, mask = inputs(2, 6, 10, H=4, Hkv=2, K=4, V=7), torch.rand(2, 1, 6, 10) > 0.3
    bias = torch.randn(4, 6, 10, dtype=torch.float64, requires_grad=True)
    added = bias.masked_fill(~(mask & in_band(6, 10, True, 5)), -torch.inf)
    found, lse = softmax_attention(*qkv, window=5, mask=mask, bias=bias, scale=0.7, return_lse=True, **way)
    same(found, by_torch(*qkv, added, scale=0.7), (*qkv, bias))
    torch.testing.assert_close(lse, lse_by_torch(qkv[0], qkv[1], added, 0.7))


@every_way
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (3, 3)])
def test_consecutive_heads_share_keys(way, heads):
    qkv = inputs(2, 9, 9, H=heads[0], Hkv=heads[1])
    same(softmax_attention(*qkv, **way), by_torch(*qkv, in_band(9, 9, True, None)), qkv)


@every_way
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_huge_scores(way, dtype):
    q, k, v = inputs(2, 9, 9, dtype=dtype)
    size = 1e4 / (q @ k.mT).abs().max().item() ** 0.5
    with torch.no_grad():
        q, k = q * size, k * size
    q, k = q.requires_grad_(), k.requires_grad_()
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    assert (doubles[0] @ doubles[1].mT).abs().max() > 1e4
    found, expected = softmax_attention(q, k, v, **way), by_torch(*doubles, in_band(9, 9, True, None))
    # Scores of 1e4 carry an error of 1e-3 in float32: what is asked there is only that nothing overflows.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-10 if dtype == torch.float64 else 0.05)
    if dtype == torch.float64:
        for ours, theirs in zip(
            torch.autograd.grad(found.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), doubles), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@every_way
@pytest.mark.parametrize("dead", ["mask", "bias", "future"])
def test_rows_that_see_nothing(way, dead):
    T, S = (6, 4) if dead == "future" else (6, 6)
    qkv, options = inputs(2, T, S), {}
    rows = [0, 1] if dead == "future" else [2, 4]
    if dead == "mask":
        options["mask"] = torch.ones(T, S, dtype=torch.bool).index_fill(0, torch.tensor(rows), False)
    if dead == "bias":
        options["bias"] = torch.zeros(T, S, dtype=torch.float64).index_fill(0, torch.tensor(rows), -torch.inf)
        options["bias"].requires_grad_()
    o, lse = softmax_attention(*qkv, return_lse=True, **options, **way)
    alive = [i for i in range(T) if i not in rows]
    assert (o[:, rows] == 0).all()
    assert (lse[:, rows] == -torch.inf).all()
    assert lse[:, alive].isfinite().all()
    wanted = [*qkv, *([options["bias"]] if dead == "bias" else [])]
    gradients = torch.autograd.grad(o.sum() + lse[:, alive].sum(), wanted, retain_graph=True)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][:, rows] == 0).all()
    for gradient in torch.autograd.grad(o[:, rows].sum(), wanted, allow_unused=True):
        assert gradient is None or (gradient == 0).all()


@every_way
@both_directions
def test_key_lengths_leave_out_what_is_not_real(way, causal):
    q, k, v = inputs(4, 3, 8, H=4, Hkv=2)
    lengths = torch.tensor([8, 5, 3, 1])
    with torch.no_grad():
        garbage = [x.detach().clone() for x in (k, v)]
        for b, length in enumerate(lengths):
            for x in garbage:
                x[b, length:] = torch.nan
        o, _ = softmax_attention(q, *garbage, causal=causal, key_lengths=lengths, return_lse=True, **way)
    for b, length in enumerate(lengths.tolist()):
        row = q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length]
        # The last query sits at the last real key; where the row is shorter than the queries, the first one at key 0.
        allowed = torch.arange(3)[:, None] + max(length - 3, 0) >= torch.arange(length) if causal else None
        torch.testing.assert_close(o[b : b + 1], by_torch(*row, allowed))
    found = softmax_attention(q, k, v, causal=causal, key_lengths=lengths, **way)
    torch.testing.assert_close(found, o)
    position = torch.arange(3) + (lengths[:, None] - 3).clamp_min(0)
    allowed = torch.arange(8) < lengths[:, None, None]
    allowed = allowed & (torch.arange(8) <= position[..., None]) if causal else allowed.expand(4, 3, 8)
    same(found, by_torch(q, k, v, allowed[:, None]), (q, k, v))


@every_way
@pytest.mark.parametrize("window", [None, 2])
def test_key_lengths_of_a_batch_padded_on_the_right(way, window):
    qkv, lengths = inputs(3, 7, 7), torch.tensor([7, 4, 0])
    allowed = in_band(7, 7, True, window) & (torch.arange(7) < lengths[:, None, None])
    o = softmax_attention(*qkv, window=window, key_lengths=lengths, **way)
    same(o, by_torch(*qkv, allowed[:, None]), qkv)


@every_way
def test_key_lengths_with_masks_biases_and_equal_rows(way):
    qkv, mask = inputs(2, 3, 8), torch.rand(2, 1, 3, 8) > 0.3
    bias = torch.randn(2, 2, 3, 8, dtype=torch.float64, requires_grad=True)

    def distance(queries, keys):
        return -0.3 * (queries[:, None] - keys).abs().double()

    for lengths in ([6, 6], [8, 5]):
        end = torch.tensor(lengths)[:, None, None, None]
        position = torch.arange(3)[:, None] + end - 3
        allowed = mask & (torch.arange(8) <= position) & (torch.arange(8) < end)
        found = softmax_attention(*qkv, mask=mask, bias=bias, key_lengths=torch.tensor(lengths), **way)
        same(found, by_torch(*qkv, bias.masked_fill(~allowed, -torch.inf)), (*qkv, bias))
        found = softmax_attention(*qkv, bias=distance, key_lengths=torch.tensor(lengths), **way)
        added = -0.3 * (position - torch.arange(8)).abs().double()
        allowed = (torch.arange(8) <= position) & (torch.arange(8) < end)
        same(found, by_torch(*qkv, added.masked_fill(~allowed, -torch.inf)), qkv)


@every_way
@both_directions
@pytest.mark.parametrize("window", [None, 3])
def test_packed_sequences_equal_separate_calls(way, causal, window):
    bounds = [0, 5, 5, 9, 14, 15]
    qkv, cu_seqlens = inputs(1, 15, 15, H=4, Hkv=2), torch.tensor(bounds, dtype=torch.int32)
    o, lse = softmax_attention(*qkv, causal=causal, window=window, cu_seqlens=cu_seqlens, return_lse=True, **way)
    alone = [
        softmax_attention(*(x[:, start:stop] for x in qkv), causal=causal, window=window, return_lse=True, **way)
        for start, stop in itertools.pairwise(bounds)
    ]
    same(o, torch.cat([part for part, _ in alone], 1), qkv, 1e-12)
    torch.testing.assert_close(lse, torch.cat([part for _, part in alone], 1))


@every_way
def test_packed_masks_and_biases_are_those_of_the_row(way):
    T, bounds = 12, [0, 4, 8, 12]
    qkv, mask = inputs(1, T, T, H=2), torch.rand(1, 2, T, T) > 0.3
    bias = torch.randn(2, T, T, dtype=torch.float64, requires_grad=True)
    sequence = torch.arange(T) // 4
    together = (sequence[:, None] == sequence) & in_band(T, T, True, None)
    options = {"cu_seqlens": torch.tensor(bounds), **way}
    same(
        softmax_attention(*qkv, mask=mask, bias=bias, **options),
        by_torch(*qkv, bias.masked_fill(~(mask & together), -torch.inf)),
        (*qkv, bias),
    )
    absolute = torch.arange(T) % 4
    added = (0.2 * absolute[:, None] + 0.3 * absolute).double().masked_fill(~together, -torch.inf)
    found = softmax_attention(*qkv, bias=lambda i, j: (0.2 * i[:, None] + 0.3 * j).double(), **options)
    same(found, by_torch(*qkv, added), qkv)


@every_way
def test_log_sum_exp_and_its_gradient(way):
    for causal, (T, S) in ((True, (9, 9)), (True, (4, 9)), (False, (9, 5))):
        q, k, v = inputs(2, T, S, H=4, Hkv=2)
        added = torch.zeros(T, S, dtype=torch.float64).masked_fill(~in_band(T, S, causal, None), -torch.inf)
        expected = lse_by_torch(q, k, added)
        _, lse = softmax_attention(q, k, v, causal=causal, return_lse=True, **way)
        same(lse, expected, (q, k))
        with torch.no_grad():
            o, lse = softmax_attention(q, k, v, causal=causal, return_lse=True, **way)
            torch.testing.assert_close(o, softmax_attention(q, k, v, causal=causal, **way))
        torch.testing.assert_close(lse, expected)


@every_form
def test_gradients_by_finite_differences(form):
    qkv, mask = inputs(1, 4, 5, H=2, Hkv=1, K=3, V=2), torch.rand(4, 5) > 0.2
    mask[0] = False
    bias = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)

    def both(q, k, v, bias):
        o, lse = softmax_attention(q, k, v, mask=mask, bias=bias, form=form, return_lse=True)
        return o, lse.clamp_min(-1e3)

    assert torch.autograd.gradcheck(both, (*qkv, bias))
    assert torch.autograd.gradcheck(lambda q, k, v: softmax_attention(q, k, v, window=2, form=form), qkv)


@every_way
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_future_leaves_the_past_bit_for_bit(way, window, dtype):
    T = {"auto": 150, "chunk": 150, "parallel": 150, "recurrent": 30}.get(way.get("form"), 12)
    q, k, v = (x.detach() for x in inputs(1, T, T, H=4, Hkv=2, dtype=dtype))
    before = softmax_attention(q, k, v, window=window, **way)
    for t in (1, T // 2, T - 1):
        changed = [torch.cat([x[:, :t], 100 * torch.randn_like(x[:, t:])], 1) for x in (q, k, v)]
        assert torch.equal(softmax_attention(*changed, window=window, **way)[:, :t], before[:, :t])


@every_way
@pytest.mark.parametrize("window", [None, 4])
def test_inputs_need_not_be_contiguous(way, window):
    B, T, H, K = 2, 9, 4, 6
    packed = torch.randn(B, 3, K, H, T, dtype=torch.float64, requires_grad=True)
    q, k, v = packed.permute(1, 0, 4, 3, 2).unbind()
    v = v[..., ::2]
    expected = by_torch(*(x.contiguous() for x in (q, k, v)), in_band(T, T, True, window))
    same(softmax_attention(q, k, v, window=window, **way), expected, [packed])
    with torch.no_grad():
        torch.testing.assert_close(softmax_attention(q, k, v, window=window, return_lse=True, **way)[0], expected)


@every_way
@pytest.mark.parametrize(("B", "T", "S"), [(0, 4, 4), (2, 0, 5), (2, 0, 0), (2, 3, 0)])
def test_nothing_to_do(way, B, T, S):
    qkv = inputs(B, T, S)
    o, lse = softmax_attention(*qkv, causal=False, window=3, return_lse=True, **way)
    assert o.shape == (B, T, 2, 5)
    assert lse.shape == (B, T, 2)
    assert (o == 0).all()
    assert (lse == -torch.inf).all()
    gradients = torch.autograd.grad(o.sum(), qkv, allow_unused=True)
    assert all(gradient is None or (gradient == 0).all() for gradient in gradients)


@every_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 5])
def test_short_floats_are_summed_in_float32(way, dtype, window):
    qkv = inputs(2, 40, 40, H=4, Hkv=2, K=16, V=16, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = by_torch(*exact, in_band(40, 40, True, window))
    with torch.no_grad():
        o, lse = softmax_attention(*qkv, window=window, return_lse=True, **way)
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    step = torch.finfo(dtype).eps
    found = softmax_attention(*qkv, window=window, **way)
    assert (found.double() - expected).norm() < step * expected.norm()
    gradients = torch.autograd.grad(found.sum(), qkv)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() < 8 * step * theirs.norm()


@every_form
@pytest.mark.parametrize("window", [None, 60])
def test_a_bias_is_not_rounded_to_short_floats(form, window):
    qkv = inputs(1, 100, 100, K=16, V=16, dtype=torch.bfloat16)
    exact = [x.detach().double() for x in qkv]

    def bias(queries, keys):
        return 20.0 - 0.1 * (queries[:, None] - keys).float()

    added = bias(torch.arange(100), torch.arange(100)).double()
    expected = by_torch(*exact, added.masked_fill(~in_band(100, 100, True, window), -torch.inf))
    found = softmax_attention(*qkv, window=window, bias=bias, form=form)
    assert (found.double() - expected).norm() < torch.finfo(torch.bfloat16).eps * expected.norm()


@every_way
def test_dtypes_may_differ_and_the_values_decide(way):
    q, k, v = inputs(1, 5, 5)
    o = softmax_attention(q.bfloat16().float(), k.bfloat16(), v.bfloat16(), **way)
    assert o.dtype == torch.bfloat16
    same_inputs = softmax_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **way)
    torch.testing.assert_close(o, same_inputs, rtol=0.02, atol=0.02)


@every_form
def test_under_autocast(form):
    q, k, v = inputs(1, 40, 40, dtype=torch.float32)
    expected = softmax_attention(q, k, v, form=form)
    with torch.autocast("cpu", torch.bfloat16):
        o = softmax_attention(q, k, v.bfloat16(), form=form)
        gradients = torch.autograd.grad(softmax_attention(q, k, v, form=form).sum(), (q, k, v))
        exact = softmax_attention(q.double(), k.double(), v.double(), form=form)
    assert o.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    torch.testing.assert_close(o.float(), expected, rtol=0.03, atol=0.03)
    torch.testing.assert_close(exact.float(), expected, rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Notes the largest memory that any operator returns."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window": 64},
        {"window": 64, "causal": False},
        {"window": 64, "bias": lambda i, j: -0.1 * (i[:, None] - j).abs().float()},
        {"form": "chunk"},
        {"cu_seqlens": torch.arange(0, 2049, 256)},
        {"cu_seqlens": torch.tensor([0, 500, 550, 1300, 2048])},
        {"key_lengths": torch.tensor([1500])},
    ],
    ids=[
        "causal",
        "bidirectional",
        "window",
        "two-sided window",
        "window and bias",
        "chunk",
        "packed alike",
        "packed",
        "key lengths",
    ],
)
def test_memory_grows_with_the_length_and_not_its_square(options):
    T = 2048
    qkv = inputs(1, T, T, H=1, K=8, V=4, dtype=torch.float32)
    with LargestTensor() as largest:
        softmax_attention(*qkv, **options).sum().backward()
    assert largest.bytes < T * T / 8  # bytes: a boolean mask of T by T would have 8 times as many


def test_second_derivatives_are_refused_by_the_tiles():
    qkv = inputs(1, 4, 4)
    o = softmax_attention(*qkv, form="chunk")
    (gradient,) = torch.autograd.grad(o.square().sum(), qkv[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


COMPILED = """
import torch
from everlong.ops.attention import softmax_attention

torch.manual_seed(0)
lengths = {"cu_seqlens": torch.tensor([0, 40, 41, 150])}, {"key_lengths": torch.tensor([90])}
for options in ({}, {"window": 40}, {"form": "chunk"}, *lengths):
    eager = lambda q, k, v: 2 * softmax_attention(q, k, v, **options)
    compiled = torch.compile(eager, backend="aot_eager")
    for T in (150,) if options in lengths else (150, 210):
        qkv = [torch.randn(1, T, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        pairs = [(o, *torch.autograd.grad(o.square().sum(), qkv)) for o in (compiled(*qkv), eager(*qkv))]
        torch.testing.assert_close(*pairs)
"""


def test_under_compile():
    # In a process of its own, as beartype's checks cannot be compiled. The warning is torch's, at any break of a graph.
    warnings = ["-W", "error", "-W", "ignore:The .grad attribute of a Tensor"]
    subprocess.run([sys.executable, *warnings, "-c", COMPILED], check=True, timeout=300)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "chunked"}, "unknown form `chunked`. Nearest: `chunk`"),
        ({"backend": "torsh"}, "unknown backend `torsh`. Nearest: `torch`"),
        ({"window": 0}, "`window` is the number of keys .* got 0"),
        ({"q": torch.zeros(2, 5, 4)}, r"are \[batch, time, heads, channels\]: got q \[2, 5, 4\]"),
        ({"q": torch.zeros(2, 5, 4, 7)}, r"same number of channels.*got q \[2, 5, 4, 7\]"),
        ({"v": torch.zeros(2, 4, 4, 8)}, r"agree in batch, time and heads.*v \[2, 4, 4, 8\]"),
        ({"q": torch.zeros(2, 5, 6, 8)}, "must be a multiple of .* Nearest: 4 or 8"),
        ({"q": torch.zeros(2, 5, 4, 8, dtype=torch.long)}, "takes floating-point tensors"),
        ({"mask": torch.ones(5, 5)}, r"`mask` is boolean.*got torch.float32. Use `mask.bool\(\)`"),
        (
            {"mask": torch.ones(5, 4, dtype=torch.bool)},
            r"`mask` must be broadcastable to .*\[2, 4, 5, 5\]: got \[5, 4\]",
        ),
        ({"bias": torch.ones(3, 5, 5)}, r"`bias` must be broadcastable to .*\[2, 4, 5, 5\]: got \[3, 5, 5\]"),
        ({"bias": torch.ones(5, 5, dtype=torch.bool)}, "For True and False use `mask`"),
        (
            {"bias": lambda i, j: torch.zeros(3, len(i) + 1, len(j))},
            "a `bias` function returns .* 5 queries and 5 keys",
        ),
        ({"key_lengths": torch.tensor([5])}, r"`key_lengths` holds an integer a row, 2: got torch.int64 \[1\]"),
        ({"key_lengths": torch.tensor([5, 6])}, r"between 0 and the number of keys, 5: got \[5, 6\]"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"packs sequences in one row, B = 1 and T = S: got q \[2, 5, 4, 8\]"),
        ({"cu_seqlens": torch.tensor([0, 5]), "key_lengths": torch.tensor([5, 5])}, "exclude each other"),
    ],
)
def test_errors_in_one_line(changes, message):
    tensors = {name: torch.zeros(2, 5, 4, 8) for name in ("q", "k", "v")}
    # What a user meets who runs without the checks of shapes that the tests run under.
    unchecked = inspect.unwrap(softmax_attention)
    with pytest.raises(ValueError, match=message) as caught:
        unchecked(**{**tensors, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bounds", [[0, 3, 2, 5], [1, 5], [0, 4], [0, 6], []])
def test_bounds_that_do_not_fit(bounds):
    qkv = inputs(1, 5, 5)
    with pytest.raises(ValueError, match="must be integers that rise from 0 to T = 5"):
        inspect.unwrap(softmax_attention)(*qkv, cu_seqlens=torch.tensor(bounds, dtype=torch.long))
