"""Linear attention: the laws of memories, other people's implementations, and what only this operator has."""

import pytest
import torch
from memory_laws import PACKED, Case, H, K, MemoryLaws, V, chunks_of, compile_all, gates, normal  # noqa: F401
from oracles import fla, rms, with_gradients

from everlong.lab.bench import errors
from everlong.ops import linear_attention


def make(name, heads=H, decay=None, constants=None, positive=False, **options):
    """A case with `heads` of queries and keys, and log-decays of that shape after [B, T]."""

    def features(b, t):
        return normal(b, t, heads, K).exp() if positive else normal(b, t, heads, K)

    tokens = {"q": features, "k": features, "v": lambda b, t: normal(b, t, H, V)}
    if decay is not None:
        tokens["log_decay"] = lambda b, t: gates(b, t, *decay)
    states, floor = (((H, K, V), (H, K)), 1.0) if options.get("normalize") else (((H, K, V),), 0.0)
    return Case(name, linear_attention, tokens, constants or {}, options, states, floor)


BONUS, POSITIVE = {"bonus": lambda: normal(H, K)}, {"bonus": lambda: normal(H, K).exp()}
CASES = [
    make("plain, grouped heads", heads=2, scale=0.3),
    make("decay of heads", constants={"log_decay": lambda: gates(H)}),
    make("decay of tokens", decay=(H,)),
    make("decay of tokens, grouped heads", heads=1, decay=(H,)),
    make("decay of channels, grouped heads", heads=2, decay=(H, K)),
    make("bonus, decay of channels", decay=(H, K), constants=BONUS),
    make("normalized, decay of tokens", normalize=True, positive=True, decay=(H,), heads=2),
    make("normalized, bonus", normalize=True, positive=True, constants=POSITIVE),
]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


class TestLaws(MemoryLaws):
    pass


@pytest.mark.parametrize(
    "oracle", [o for o in errors.ORACLES if o.operator == "linear_attention"], ids=lambda o: o.name
)
def test_agrees_with_flash_linear_attention(oracle):
    fla("fla/ops/gla/naive.py")
    for name, inputs, state, bounds in errors.cases(oracle):
        theirs = oracle.theirs if bounds is None else errors.separately(oracle, bounds)
        expected = errors.with_gradients(theirs, inputs, state)
        for form in errors.FORMS:
            found = errors.with_gradients(lambda x, s, f=form, b=bounds: oracle.ours(x, s, f, b), inputs, state)
            for key in expected:
                assert errors.relative(found[key], expected[key]) < 1e-5, (name, form, key)


def both_ways(q, k, v, scale=K**-0.5):
    return scale * torch.einsum("bthk,bshk,bshv->bthv", q, k, v)


def test_bidirectional_reads_the_whole_sequence():
    shapes = ((2, 9, 2, K), (2, 9, 2, K), (2, 9, H, V), (2, H, K, V))
    q, k, v, state = (normal(*shape).double() for shape in shapes)
    wide = [x.repeat_interleave(2, 2) for x in (q, k)]
    expected = both_ways(*wide, v) + K**-0.5 * torch.einsum("bthk,bhkv->bthv", wide[0], state)
    for backend in ("torch", "reference"):
        o, last = linear_attention(q, k, v, causal=False, initial_state=state, backend=backend)
        assert rms(o, expected) < 1e-14
        assert rms(last, state + torch.einsum("bthk,bthv->bhkv", wide[1], v)) < 1e-14


@pytest.mark.parametrize("normalize", [False, True])
def test_bidirectional_agrees_with_the_reference(normalize):
    bounds = torch.tensor([0, *torch.tensor(PACKED).cumsum(0).tolist()])
    for batch, sequences, options in ((2, 2, {}), (1, len(PACKED), {"cu_seqlens": bounds})):
        leaves = [normal(batch, sum(PACKED), 2, K).exp(), normal(batch, sum(PACKED), 2, K).exp()]
        leaves += [normal(batch, sum(PACKED), H, V), normal(sequences, H, K, V), normal(sequences, H, K).exp()]

        def run(q, k, v, memory, total, backend="auto", options=options):
            state = (memory, total) if normalize else memory
            return linear_attention(
                q, k, v, causal=False, normalize=normalize, initial_state=state, backend=backend, **options
            )

        expected = with_gradients(lambda *x: run(*x, backend="reference"), leaves)
        for found, other in zip(with_gradients(run, leaves), expected, strict=True):
            assert rms(found, other) < 1e-12


def test_bidirectional_of_nothing():
    empty, state = torch.zeros(2, 0, H, K), normal(2, H, K, V)
    o, last = linear_attention(empty, empty, torch.zeros(2, 0, H, V), causal=False, initial_state=state)
    assert o.shape == (2, 0, H, V)
    assert torch.equal(last, state)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_zero_denominator_gives_zero(causal, backend):
    q, v = normal(1, 20, H, K).exp(), normal(1, 20, H, V)
    q, k, v = (x.requires_grad_() for x in (q, torch.zeros(1, 20, H, K), v))
    o, _ = linear_attention(q, k, v, normalize=True, causal=causal, backend=backend)
    assert torch.equal(o, torch.zeros_like(o))
    for gradient in torch.autograd.grad(o.sum(), (q, k, v)):
        assert gradient.isfinite().all()


def test_constant_decay_is_a_decay_of_tokens():
    q, k, v, g = normal(2, 70, H, K), normal(2, 70, H, K), normal(2, 70, H, V), gates(H)
    o, state = linear_attention(q, k, v, log_decay=g)
    other, last = linear_attention(q, k, v, log_decay=g.expand(2, 70, H))
    assert torch.equal(o, other)
    assert torch.equal(state, last)


def test_slow_decay_keeps_its_digits():
    """1e-6 a token is lost in a product of float32 factors, which are all 1; it is not in a sum of logarithms."""
    length = 4000
    k = v = torch.ones(1, length, 1, 1)
    o, _ = linear_attention(k, k, v, log_decay=torch.full((1,), -1e-6), scale=1.0)
    expected = torch.exp(-1e-6 * torch.arange(length, dtype=torch.float64)).cumsum(0)
    assert (o.flatten() / expected - 1).abs().max() < 3e-6


def test_weak_decay_after_a_strong_one_keeps_its_digits():
    length = 64
    g = torch.full((1, length, 1), -1e-3)
    g[:, 0::8] = -9000.0
    k = v = torch.ones(1, length, 1, 1)
    o, _ = linear_attention(k, k, v, log_decay=g, scale=1.0, form="chunk")
    expected = torch.exp(-1e-3 * torch.arange(8, dtype=torch.float64)).cumsum(0).repeat(length // 8)
    assert (o.flatten() / expected - 1).abs().max() < 1e-6


@pytest.mark.parametrize("form", ["parallel", "chunk", "recurrent"])
def test_memory_does_not_hold_products_of_keys_and_values(form):
    """The chunk form saves inputs and one state for each chunk; nothing T x T nor T x K x V."""
    length, size = 2048, 16
    q, k, v = (torch.randn(1, length, 1, size).requires_grad_() for _ in range(3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        linear_attention(q, k, v, log_decay=-torch.rand(1, length, 1), form=form)
    if form == "chunk":
        assert sum(saved) < 5 * length * size + 2 * length * size * size / 64
    assert saved


def test_operators_of_the_chunk_form_keep_torchs_rules():
    """Schemas, fake shapes and the registration of gradients, as torch itself checks them."""
    q, k = (torch.randn(1, 11, 2, K).requires_grad_() for _ in range(2))
    v, state = torch.randn(1, 11, H, V).requires_grad_(), torch.randn(1, H, K, V).requires_grad_()
    packed, states = torch.tensor([0, 2, 2, 11]), torch.randn(3, H, K, V)
    operator = torch.ops.everlong.linear_attention_chunk.default
    for log_decay in (None, gates(1, 11, H).requires_grad_(), gates(1, 11, H, K).requires_grad_()):
        torch.library.opcheck(operator, (q, k, v, log_decay, state, None, 0.5, 4))
        torch.library.opcheck(operator, (q, k, v, log_decay, states, packed, 0.5, 4))


def test_compiles_without_warnings():
    compile_all(__file__)


Q, VALUES = torch.zeros(2, 5, 2, K), torch.zeros(2, 5, H, V)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "tree"}, "unknown form `tree`"),
        ({"backend": "fast"}, "unknown backend `fast`"),
        ({"v": torch.zeros(2, 5, 3, V)}, "the heads of `v` must be a multiple of those of `q` and `k`: got 3 and 2"),
        ({"causal": False, "log_decay": torch.zeros(H)}, "`log_decay` and `bonus` need an order of tokens"),
        ({"normalize": True, "initial_state": torch.zeros(2, H, K, V)}, "the state is a pair (S, z) with `normalize`"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "packed in one row: got 2 rows"),
        ({"q": Q[:1], "k": Q[:1], "v": VALUES[:1], "cu_seqlens": torch.tensor([0, 4])}, "must rise from 0 to"),
        ({"initial_state": torch.zeros(3, H, K, V)}, "`initial_state` must be [2, 4, 5, 3] here: got [3, 4, 5, 3]"),
    ],
)
def test_errors_say_what_is_wrong(options, message):
    given = {"q": Q, "k": Q, "v": VALUES, **options}
    for form in ("chunk", "recurrent") if "form" not in options else ("tree",):
        with pytest.raises(ValueError, match=".") as caught:
            linear_attention(**{"form": form, **given})
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
