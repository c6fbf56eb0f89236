"""Patterns against their definition, pair by pair; and the work of the forms, counted in FLOPs."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from everlong.nn import sparse
from everlong.nn.sparse import Keys, Pattern, Queries

PATTERNS = [
    Pattern(True, near=near, far=far, window=window, stride=stride, summary=2, global_tokens=first, reading=reading)
    for (near, window), far, stride, (first, reading) in itertools.product(
        [(None, 1), ("window", 1), ("window", 9), ("block", 1)],
        [None, "multiples", "summaries"],
        [3, 8],
        [(0, True), (5, True), (5, False)],
    )
]
patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


@patterns
def test_keys_are_counted_as_they_are_seen(pattern):
    places = torch.arange(40)
    for causal in (True, False):
        rule = sparse.replace(pattern, causal=causal)
        seen = rule.visible(places[None], places[None])[0].sum(1)
        assert torch.equal(rule.count(places, 40), seen)
        if causal:  # what follows changes nothing
            assert torch.equal(rule.count(places[:7], 7), seen[:7])


@patterns
def test_what_is_kept_is_what_later_tokens_see(pattern):
    places = torch.arange(60)
    seen = pattern.visible(places[None], places[None])[0]
    for length in range(30):
        later = seen[length:].any(0)[None, :length]
        kept = pattern.kept(places[None, :length], torch.tensor([[length]]))
        assert bool((kept | ~later).all())
        # Where global tokens do not read here, those to come do not need what is near.
        assert torch.equal(kept, later) or (not pattern.reading and length < 5)


def tokens(length, past=0, heads=2, size=4):
    places = torch.arange(past + length)[None]
    k, v = (torch.randn(1, past + length, heads, size, dtype=torch.float64) for _ in range(2))
    q = torch.randn(1, length, heads, size, dtype=torch.float64)
    return Queries(q, places[:, past:], places[:, past:]), Keys(k, v, places, places)


@patterns
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_and_classes_are_the_mask(pattern, causal):
    rule = sparse.replace(pattern, causal=causal)
    for length, past in ((65, 0), (100, 23), (150, 2)) if causal else ((65, 0), (140, 0)):
        q, k = tokens(length, past)
        expected = rule.attend(q, k, form="parallel")
        torch.testing.assert_close(rule.attend(q, k), expected, atol=1e-12, rtol=1e-12)
        if causal:  # and what nobody sees any more need not be there
            there = rule.kept(k.places[:, :past], torch.tensor([[past]]))[0].nonzero()[:, 0]
            fewer = k.pick(torch.cat([there, torch.arange(past, past + length)]))
            torch.testing.assert_close(rule.attend(q, fewer), expected, atol=1e-12, rtol=1e-12)


def test_tiles_computed_once_more_have_the_same_gradients(monkeypatch):
    rule, results = Pattern(True, near="block", far="summaries", stride=16, summary=3, global_tokens=4), []
    q, k = tokens(200)
    for limit in (sparse.LIMIT, 0):
        monkeypatch.setattr(sparse, "LIMIT", limit)
        leaves = [x.detach().clone().requires_grad_() for x in (q.vectors, k.keys, k.values)]
        y = rule.attend(q._replace(vectors=leaves[0]), k._replace(keys=leaves[1], values=leaves[2]))
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def scores(pattern, q, k):
    """How many scores of one head are computed, by the products that are: 2 FLOPs each for q k and for the values."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pattern.attend(q, k, form="chunk")
    return counter.get_total_flops() // 4


WORK = {
    "window": ({"near": "window", "window": 64}, lambda T: 64 * T),
    "strided": ({"near": "window", "far": "multiples", "window": 64, "stride": 64}, lambda T: T * (64 + T / 64)),
    "fixed": ({"near": "block", "far": "summaries", "stride": 64, "summary": 8}, lambda T: T * (64 + T * 8 / 64)),
    "atrous": ({"far": "multiples", "stride": 64}, lambda T: T * T / 64),
    "small blocks": ({"near": "block", "stride": 5}, lambda T: T * sparse.FEW),
}


@pytest.mark.parametrize("global_tokens", [0, 16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", WORK)
def test_the_work_is_what_the_pattern_needs(name, causal, global_tokens):
    options, needed = WORK[name]
    rule = Pattern(causal, **options, global_tokens=global_tokens)
    for length in (512, 1024, 2048, 4096):
        computed = scores(rule, *tokens(length, heads=1, size=1))
        assert computed <= (3 if causal else 4) * needed(length) + 2 * length * global_tokens
        assert computed >= int(rule.count(torch.arange(length), length).sum())


@pytest.mark.parametrize(("name", "keys"), [("window", 64), ("fixed", 64 + 512), ("atrous", 65), ("strided", 64 + 65)])
def test_a_token_reads_what_it_sees_and_no_more(name, keys):
    options, _ = WORK[name]
    assert keys - 65 < scores(Pattern(True, **options), *tokens(1, past=4096 - 33, heads=1, size=1)) <= keys
