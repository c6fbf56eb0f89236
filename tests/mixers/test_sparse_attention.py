"""What is particular to sparse attention: how patterns compose, what the state keeps, positions with gaps."""

import pytest
import torch

from everlong import mixers
from everlong.mixers.base import Context
from everlong.models.lm import LanguageModel, ModelConfig

Sparse, Attention = mixers.load("sparse_attention"), mixers.load("attention")


def make(**options):
    return Sparse(Sparse.Config(width=24, num_heads=2, **options)).double()


def inputs(batch, length):
    return torch.randn(batch, length, 24, dtype=torch.float64)


@pytest.mark.parametrize("position", ["rope", "alibi", "t5", "none"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("options", "window"),
    [
        ({"pattern": "window", "window": 9}, 9),
        ({"pattern": "strided", "stride": 9, "compose": "near"}, 9),
        ({"pattern": "strided", "stride": 1}, None),
        ({"pattern": "fixed", "stride": 500}, None),
        ({"pattern": "atrous", "stride": 1}, None),
        ({"pattern": "window", "window": 1, "global_tokens": 500}, None),
    ],
)
def test_some_patterns_are_attention(options, window, causal, position):
    """With given positions that have gaps, unequal in the rows, as well."""
    ours = make(position=position, causal=causal, **options)
    theirs = Attention(
        Attention.Config(width=24, num_heads=2, position=position, causal=causal, window=window)
    ).double()
    theirs.load_state_dict(ours.state_dict())
    x = inputs(2, 90)
    gaps = torch.randint(1, 4, (2, 90)).cumsum(1)
    for given in (None, gaps, gaps[:1].expand(2, -1)):
        context = Context(positions=given)
        torch.testing.assert_close(ours(x, None, context)[0], theirs(x, None, context)[0], atol=1e-10, rtol=1e-10)
    if causal:
        _, own = ours(x[:, :70], None, Context(positions=gaps[:, :70]))
        _, other = theirs(x[:, :70], None, Context(positions=gaps[:, :70]))
        rest = Context(positions=gaps[:, 70:])
        y, z = ours(x[:, 70:], own, rest)[0], theirs(x[:, 70:], other, rest)[0]
        torch.testing.assert_close(y, z, atol=1e-10, rtol=1e-10)


def test_strided_is_what_su_calls_sparse():
    one, other = make(pattern="strided", stride=7), make(pattern="sparse", stride=7)
    other.load_state_dict(one.state_dict())
    x = inputs(1, 100)
    torch.testing.assert_close(one(x)[0], other(x)[0])


@pytest.mark.parametrize("pattern", ["strided", "fixed", "sparse"])
def test_halves_of_the_heads_are_near_and_far(pattern):
    both, near, far = (make(pattern=pattern, stride=6, summary=2, compose=way) for way in ("heads", "near", "far"))
    for one in (near, far):
        one.load_state_dict(both.state_dict())
    for mixer in (both, near, far):
        mixer.o.weight.data = torch.eye(24, dtype=torch.float64)
    x = inputs(2, 80)
    expected = torch.cat([near(x)[0][..., :12], far(x)[0][..., 12:]], -1)
    torch.testing.assert_close(both(x)[0], expected)


def test_near_and_far_in_every_other_layer():
    layer = {"mixer": "sparse_attention", "pattern": "strided", "stride": 5, "compose": "layers"}
    model = LanguageModel(ModelConfig(vocab_size=11, width=24, num_layers=3, layers=[layer]))
    assert [block.mixer.config.compose for block in model.blocks] == ["near", "far", "near"]
    assert model.cost(50).flops_per_token > 0


@pytest.mark.parametrize(("window", "depth"), [(5, 1), (5, 3), (4, 6)])
def test_layers_of_windows_see_one_and_depth_times_window_less_one(window, depth):
    layers = [make(pattern="window", window=window) for _ in range(depth)]
    x = inputs(1, 40).requires_grad_()
    y = x
    for layer in layers:
        y = layer(y)[0]
    y[0, -1].sum().backward()
    reached = (x.grad[0] != 0).any(-1)
    assert reached.sum() == 1 + depth * (window - 1)
    assert bool(reached[-int(reached.sum()) :].all())


def test_two_strided_layers_see_everything():
    layers = [make(pattern="strided", stride=6, compose=part) for part in ("far", "near")]
    x = inputs(1, 50).requires_grad_()
    layers[1](layers[0](x)[0])[0][0, -1].sum().backward()
    assert bool((x.grad[0] != 0).any(-1).all())


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"pattern": "window", "window": 9}, lambda n: min(n, 8)),
        ({"pattern": "window", "window": 9, "global_tokens": 3}, lambda n: min(n, 8) + min(3, max(0, n - 8))),
        ({"pattern": "fixed", "stride": 8, "summary": 3}, lambda n: n // 8 * 3 + n % 8),
        ({"pattern": "fixed", "stride": 8, "summary": 3, "compose": "near"}, lambda n: n % 8),
        ({"pattern": "strided", "stride": 8}, lambda n: n),
        ({"pattern": "strided", "stride": 8, "compose": "near"}, lambda n: min(n, 7)),
    ],
)
def test_the_state_keeps_what_may_still_be_seen(options, kept):
    mixer = make(**options)
    x, state = inputs(1, 30), None
    for n in range(31):
        if n:
            _, state = mixer(x[:, n - 1 : n], state)
            assert state.caches[0].keys.shape[1] == kept(n)
            assert torch.equal(state.caches[0].numbers, mixer(x[:, :n])[1].caches[0].numbers)


@pytest.mark.parametrize("new", [1, 70])
@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "window", "window": 9, "global_tokens": 12, "global_projections": "own"},
        {"pattern": "strided", "stride": 5, "compose": "heads"},
        {"pattern": "fixed", "stride": 8, "summary": 3, "position": "alibi"},
    ],
)
def test_rows_that_have_come_unequally_far(options, new):
    """A batch of states after 3, 40 and 3 tokens goes on as each of them would."""
    mixer = make(**options)
    prefixes = [inputs(1, length) for length in (3, 40, 3)]
    padding = torch.arange(40)[None] >= 40 - torch.tensor([3, 40, 3])[:, None]
    rows = torch.cat([torch.nn.functional.pad(x, (0, 0, 40 - x.shape[1], 0)) for x in prefixes])
    _, state = mixer(rows, None, Context(padding=padding))
    x, more = inputs(3, new), inputs(3, 1)
    y, state = mixer(x, state)
    z, _ = mixer(more, state)
    for n, prefix in enumerate(prefixes):
        whole = mixer(torch.cat([prefix, x[n : n + 1], more[n : n + 1]], 1))[0]
        torch.testing.assert_close(torch.cat([y, z], 1)[n], whole[0, prefix.shape[1] :], atol=1e-10, rtol=1e-10)


def test_no_sequences_at_all():
    y, state = make()(inputs(1, 0), None, Context(cu_seqlens=torch.tensor([0])))
    assert y.shape == (1, 0, 24)
    assert state.length.shape == (0,)
    assert make()(inputs(0, 90))[0].shape == (0, 90, 24)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"window": 0}, "`window` and `stride` must be at least 1 .* got window=0, stride=64"),
        ({"stride": 4, "summary": 4}, "`summary` must be at least 1 and below `stride`: got summary=4, stride=4"),
        ({"pattern": "atrous", "compose": "heads"}, "`atrous` has no two parts to compose.* strided, fixed, sparse"),
        ({"num_kv_heads": 1, "compose": "heads"}, "needs two heads of keys and values: got 1"),
        ({"global_projections": "own"}, "need `global_tokens` of at least 1"),
        ({"position": "shaw"}, "has no score or value .* It takes: .*alibi.*rope"),
    ],
)
def test_what_cannot_work_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        make(**options)
