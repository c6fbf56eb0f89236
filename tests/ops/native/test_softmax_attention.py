"""The kernels of softmax attention: the laws of all kernels, and what a softmax adds."""

import subprocess
import sys

import kernel_laws as laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.ops import softmax_attention
from everlong.ops.native.softmax_attention import _backward, _forward

PACKED = torch.tensor([0, 0, 3, 4, 40, 42, 42, 170])
LENGTHS = [0, 1, 2, 15, 16, 17, 63, 65, 300]
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def inputs(T, S=None, *, B=2, H=2, Hkv=None, K=16, V=16, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    S, Hkv = T if S is None else S, Hkv or H
    shapes = {"q": (B, T, H, K), "k": (B, S, Hkv, K), "v": (B, S, Hkv, V)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def attention(**options):
    """The operator with these options. lse is 0 where a query sees nothing: -inf would make the comparison NaN."""

    def run(**tensors):
        o, lse = softmax_attention(**tensors, **options, return_lse=True)
        return o, lse.masked_fill(lse == -torch.inf, 0.0)

    return run


@both_dtypes
@pytest.mark.parametrize("length", LENGTHS)
def test_the_reference_is_met(length, dtype):
    laws.check(attention(), inputs(length, B=1, dtype=dtype))


@both_dtypes
@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 128), (1, 3), (37, 70), (96, 33)])
def test_any_number_of_channels(K, V, dtype):
    laws.check(attention(), inputs(70, B=1, K=K, V=V, dtype=dtype))


@both_dtypes
@pytest.mark.parametrize(("H", "Hkv"), [(4, 2), (3, 1), (6, 2)])
@pytest.mark.parametrize(("T", "S"), [(70, 70), (20, 150), (150, 20), (1, 140)])
def test_grouped_heads_and_queries_at_the_end(T, S, H, Hkv, dtype):
    laws.check(attention(), inputs(T, S, B=1, H=H, Hkv=Hkv, dtype=dtype))


@both_dtypes
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5, 64, 100])
@pytest.mark.parametrize(("T", "S"), [(200, 200), (60, 190), (190, 60)])
def test_windows(T, S, window, causal, dtype):
    laws.check(attention(causal=causal, window=window), inputs(T, S, B=1, H=1, dtype=dtype))


@both_dtypes
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 7}], ids=str)
def test_packed_sequences(options, dtype):
    laws.check(attention(cu_seqlens=PACKED, **options), inputs(170, B=1, dtype=dtype))


@both_dtypes
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 7}], ids=str)
@pytest.mark.parametrize("T", [1, 6, 90])
def test_key_lengths(T, options, dtype):
    lengths = torch.tensor([90, 17, 4, 0], dtype=torch.int32)
    laws.check(attention(key_lengths=lengths, **options), inputs(T, 90, B=4, H=2, Hkv=1, dtype=dtype))


@both_dtypes
@pytest.mark.parametrize("shape", [(2, 2, 90, 150), (90, 150), (2, 1, 1, 150), (1, 2, 90, 1), (150,)], ids=str)
def test_masks(shape, dtype):
    torch.manual_seed(1)
    mask = torch.rand(shape) > 0.4
    laws.check(attention(mask=mask, causal=False), inputs(90, 150, dtype=dtype))
    laws.check(attention(mask=mask, window=40), inputs(90, 150, dtype=dtype))


@both_dtypes
def test_a_mask_of_blocks_many_of_which_are_empty(dtype):
    mask = torch.eye(5, dtype=torch.bool).repeat_interleave(40, 0).repeat_interleave(40, 1)
    laws.check(attention(mask=mask, causal=False), inputs(200, H=1, dtype=dtype))
    laws.check(attention(mask=mask[:170, :170], cu_seqlens=PACKED), inputs(170, B=1, H=1, dtype=dtype))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_rule(data):
    draw = data.draw
    Hkv, shared = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    T, S = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    shape = {"B": draw(st.integers(1, 2)), "H": Hkv * shared, "Hkv": Hkv}
    shape |= {"K": draw(st.integers(1, 70)), "V": draw(st.integers(1, 70))}
    options = {
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.integers(1, 150)),
        "scale": draw(st.none() | st.floats(-1.0, 1.0)),
    }
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    laws.check(attention(**options), inputs(T, S, **shape, dtype=dtype, seed=draw(st.integers(0, 99))))


@both_dtypes
@pytest.mark.parametrize("options", [{}, {"window": 70}, {"causal": False}], ids=str)
def test_neither_threads_nor_repetition_change_a_bit(options, dtype):
    laws.check_repeatable(attention(**options), inputs(500, H=4, Hkv=2, dtype=dtype))


@both_dtypes
def test_packed_sequences_do_not_depend_on_threads(dtype):
    laws.check_repeatable(attention(cu_seqlens=PACKED), inputs(170, B=1, H=4, Hkv=2, dtype=dtype))


@both_dtypes
@pytest.mark.parametrize("T", [1, 2, 200])
def test_a_row_does_not_depend_on_the_others(T, dtype):
    whole = inputs(T, 300, B=3, H=2, Hkv=1, dtype=dtype)
    alone = {name: x[1:2] for name, x in whole.items()}
    weights, part = [], []
    together = laws.outcome(attention(), whole, "native", weights)
    part += [x[1:2] for x in weights]
    for name, found in laws.outcome(attention(), alone, "native", part).items():
        assert torch.equal(found, together[name][1:2]), name


@both_dtypes
def test_numbers_may_lie_anywhere(dtype):
    for T in (1, 33):
        given = inputs(T, 75, K=19, V=21, dtype=dtype)
        laws.check(attention(), {name: laws.scattered(x) for name, x in given.items()})
        turned = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in given.items()}
        laws.check(attention(), turned)
        strided = {name: x.transpose(1, 3).contiguous().transpose(1, 3) for name, x in given.items()}
        laws.check(attention(), strided)


@both_dtypes
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
@pytest.mark.parametrize("options", [{}, {"window": 20}], ids=str)
def test_a_broken_future_leaves_the_past_bit_for_bit(options, number, dtype):
    whole, cut = inputs(150, H=1, K=64, V=64, dtype=dtype), 83
    broken = {name: x.clone() for name, x in whole.items()}
    for x in broken.values():
        x[:, cut:] = number
    weights = []
    results = [laws.outcome(attention(**options), given, "native", weights) for given in (whole, broken)]
    for before, after in zip(*(result.items() for result in results), strict=True):
        if before[0].startswith("result") or before[0].endswith(" q"):
            assert torch.equal(before[1][:, :cut], after[1][:, :cut]), before[0]


@both_dtypes
def test_gradients_of_queries_leave_unseen_keys_alone(dtype):
    given = {name: x.requires_grad_() for name, x in inputs(150, H=1, K=64, V=64, dtype=dtype).items()}
    o = softmax_attention(**given, backend="native")
    weights = torch.randn_like(o)
    weights[:, :83] = torch.inf
    gradients = torch.autograd.grad(o, [given["k"], given["v"]], weights)
    assert all(gradient[:, 83:].isfinite().all() for gradient in gradients)


def test_huge_scores():
    given = inputs(100, K=64)
    given |= {name: 40 * given[name] for name in ("q", "k")}
    # Scores of some thousands carry an error of 1e-4 in float32, and so do the weights.
    laws.check(attention(), given, bound=1e-3)


@pytest.mark.parametrize(("T", "S"), [(90, 90), (1, 90)])
def test_torch_knows_the_operators(T, S):
    q, k, v = (x.requires_grad_() for x in inputs(T, S, H=2, Hkv=1).values())
    mask, lengths = torch.ones(2, 2, T, S, dtype=torch.bool), torch.tensor([90, 40])
    for options in ((None, None), (mask, lengths)):
        torch.library.opcheck(_forward, (q, k, v, *options, None, 0.25, 50, 0))
    q, k, v = (x.detach() for x in (q, k, v))
    o, lse = _forward(q, k, v, None, None, None, 0.25, 50, 0)
    torch.library.opcheck(_backward, (q, k, v, None, None, None, 0.25, 50, 0, o, lse, o, lse))


COMPILED = """
import torch
from everlong.ops import softmax_attention

torch.manual_seed(0)
for options in ({}, {"window": 40}, {"mask": torch.rand(150, 150) > 0.3}):
    eager = lambda q, k, v: 2 * softmax_attention(q, k, v, **options, backend="native")
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    qkv = [torch.randn(1, 150, 2, 8, requires_grad=True) for _ in range(3)]
    pairs = [(o, *torch.autograd.grad(o.square().sum(), qkv)) for o in (compiled(*qkv), eager(*qkv))]
    torch.testing.assert_close(*pairs, rtol=0, atol=0)
"""


def test_under_compile():
    subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=300)


def test_autocast_computes_in_its_dtype_and_returns_the_values_dtype():
    given = inputs(40)
    with torch.autocast("cpu", torch.bfloat16):
        found = softmax_attention(**given, backend="native")
    short = softmax_attention(**{name: x.bfloat16() for name, x in given.items()}, backend="native")
    assert found.dtype == torch.float32
    assert torch.equal(found, short.float())


def test_what_the_kernels_do_not_cover_is_computed_by_torch():
    given = {name: x.requires_grad_() for name, x in inputs(40).items()}
    bias = torch.randn(2, 1, 40, 40, requires_grad=True)
    found = softmax_attention(**given, bias=bias, backend="native")
    expected = softmax_attention(**given, bias=bias, backend="torch")
    assert torch.equal(found, expected)
    wider = given | {"v": given["v"].double()}
    assert torch.equal(softmax_attention(**wider, backend="native"), softmax_attention(**wider, backend="torch"))
    assert torch.autograd.grad(found.sum(), bias)[0].isfinite().all()


def test_bad_bounds_are_refused_before_the_kernel_runs():
    with pytest.raises(ValueError, match="rise from 0 to T = 9"):
        softmax_attention(**inputs(9, B=1), cu_seqlens=torch.tensor([0, 12]), backend="native")
    q, k, v = inputs(9, B=1).values()
    with pytest.raises(ValueError, match="must rise from 0 to T = 9"):
        _forward(q, k, v, None, None, torch.tensor([0, 12]), 0.25, 50, 0)
