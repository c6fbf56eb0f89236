"""Sampling: the filters against those of transformers, the draw against the distribution that it is drawn from."""

import math

import pytest
import torch

from everlong.generate import sampling as ours
from everlong.generate.sampling import Sampling

SEEDS = range(8)


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("transformers.generation.logits_process", reason="needs transformers")


def logits(seed, batch=5, vocabulary=203):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, vocabulary, generator=generator) * (1 + seed)


def equal(one, other):
    assert torch.equal(one.isinf(), other.isinf())
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 2, 17, 203, 500])
def test_top_k(theirs, seed, k):
    scores = logits(seed)
    equal(ours.top_k(scores, k), theirs.TopKLogitsWarper(k)(None, scores))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.95, 1.0])
def test_top_p(theirs, seed, p):
    scores = logits(seed)
    equal(ours.top_p(scores, p), theirs.TopPLogitsWarper(p)(None, scores))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [1e-6, 0.01, 0.3, 1.0])
def test_min_p(theirs, seed, p):
    scores = logits(seed)
    equal(ours.min_p(scores, p), theirs.MinPLogitsWarper(p)(None, scores))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 4.0])
def test_repetition_penalty(theirs, seed, penalty):
    scores = logits(seed)
    tokens = torch.randint(scores.shape[1], (scores.shape[0], 30), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, tokens, True)
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(tokens, scores.clone())
    equal(ours.penalize(scores, seen, penalty), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_order_of_all_of_them(theirs, seed):
    scores = logits(seed)
    chain = theirs.LogitsProcessorList(
        [
            theirs.TemperatureLogitsWarper(0.7),
            theirs.TopKLogitsWarper(40),
            theirs.TopPLogitsWarper(0.9),
            theirs.MinPLogitsWarper(0.05),
        ]
    )
    equal(ours.restrict(scores / 0.7, Sampling(top_k=40, top_p=0.9, min_p=0.05)), chain(None, scores))


def chi_square(counts, probabilities):
    """Pearson's statistic in standard deviations above what it is for the true distribution."""
    expected = probabilities * counts.sum()
    held = expected >= 5  # cells with fewer are put together, as the test's approximation asks
    counts = torch.cat([counts[held], counts[~held].sum()[None]])
    expected = torch.cat([expected[held], expected[~held].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "rule",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=3.0),
        Sampling(top_k=7),
        Sampling(top_p=0.8),
        Sampling(min_p=0.1),
        Sampling(temperature=1.5, top_k=20, top_p=0.9, min_p=0.02),
    ],
)
def test_draws_follow_the_distribution(rule):
    draws, scores = 20_000, logits(0, batch=1, vocabulary=50)
    probabilities = ours.restrict(scores / rule.temperature, rule).softmax(-1)[0].double()
    stream = torch.Generator().manual_seed(1)
    uniform = [stream] * draws  # one stream for all rows: 20,000 numbers of it
    tokens = ours.sample(scores.expand(draws, -1), rule, None, uniform)
    counts = torch.bincount(tokens, minlength=50).double()
    assert counts[probabilities == 0].sum() == 0
    assert chi_square(counts, probabilities) < 4


def test_streams_of_neighbouring_seeds_are_independent():
    """The first number of seeds 0, 1, 2, ... is uniform, and so is the pair of first and second."""
    streams = ours.generators(0, 20_000)
    even = torch.zeros(1, 8).expand(20_000, -1)
    first, second = (ours.draw(even, streams) for _ in range(2))
    counts = torch.bincount(first * 8 + second, minlength=64).double()
    assert chi_square(counts, torch.full((64,), 1 / 64, dtype=torch.float64)) < 4


def test_a_row_depends_on_its_own_seed_only():
    scores = logits(3, batch=6)
    together = ours.sample(scores, Sampling(), None, ours.generators([11, 5, 7, 5, 2, 9], 6))
    for row, seed in enumerate([11, 5, 7, 5, 2, 9]):
        assert ours.sample(scores[row : row + 1], Sampling(), None, ours.generators(seed, 1)) == together[row]


def test_temperature_zero_is_greedy_after_the_penalty():
    scores = torch.tensor([[1.0, 5.0, 4.9], [3.0, 2.0, 3.0]])
    greedy = Sampling(temperature=0, top_k=2, repetition_penalty=1.1)
    seen = torch.tensor([[False, True, False], [False, False, False]])
    assert ours.sample(scores, greedy, seen, ours.generators(0, 2)).tolist() == [2, 0]
    assert ours.sample(scores, greedy, None, ours.generators(0, 2)).tolist() == [1, 0]


def test_low_temperature_does_not_overflow():
    assert ours.sample(logits(1) * 100, Sampling(temperature=1e-30), None, ours.generators(0, 5)).shape == (5,)


def test_a_forbidden_token_is_never_drawn_at_the_edges(monkeypatch):
    """At the ends of the unit interval rounding must not find a token of probability 0."""

    scores = torch.full((2, 9), -torch.inf)
    scores[:, 3] = 0.0
    scores[:, 5] = 0.0
    for edge in (0.0, 1.0 - 2**-53):
        monkeypatch.setattr(torch, "rand", lambda *size, edge=edge, **_: torch.full(size, edge, dtype=torch.float64))
        assert ours.draw(scores, ours.generators(0, 2)).tolist() == ([3, 3] if edge == 0 else [5, 5])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_told(bad, temperature):
    scores = logits(0)
    scores[2, 4] = bad
    with pytest.raises(ValueError, match="logits are not finite"):
        ours.sample(scores, Sampling(temperature=temperature), None, ours.generators(0, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "`temperature` must be at least 0"),
        ({"temperature": math.nan}, "`temperature`"),
        ({"temperature": math.inf}, "`temperature`"),
        ({"top_k": 0}, "`top_k` must be at least 1"),
        ({"top_p": 0.0}, "`top_p` must be above 0 and at most 1"),
        ({"top_p": 1.1}, "`top_p`"),
        ({"min_p": -1.0}, "`min_p`"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty`"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.parametrize("seed", [-1, [1, 2], 2**63, [1, 2, -3]])
def test_bad_seeds(seed):
    with pytest.raises(ValueError, match="`seed` must be"):
        ours.generators(seed, 3)
