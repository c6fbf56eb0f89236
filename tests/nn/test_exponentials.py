"""Averages under exponentials: exact at exponents that overflow any float, and causal in every bit."""

import pytest
import torch

from everlong.nn.exponentials import Sums, average, nothing, running_maximum

HEADS, FEATURES, VALUES = 2, 5, 3
FORMS = ("parallel", "chunk", "recurrent", "auto")


def empty(count, dtype=torch.float64):
    memory = torch.zeros(count, HEADS, FEATURES, VALUES, dtype=dtype)
    return Sums(memory, memory[..., :1].clone(), nothing(memory[..., 0]))


def inputs(batch, length, scale=1.0, dtype=torch.float64):
    q, k = scale * torch.randn(2, batch, length, HEADS, FEATURES, dtype=dtype)
    return q, k, torch.randn(batch, length, HEADS, VALUES, dtype=dtype)


def dense(q, k, v, causal):
    """Weights as logarithms of sums, then a softmax over keys."""
    scores = torch.logsumexp(q[:, :, None] + k[:, None], -1)  # [B, T, S, H]
    if causal:
        length = q.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden[:, :, None], -torch.inf)
    return torch.einsum("btsh,bshv->bthv", scores.softmax(2), v)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1.0, 30.0, 3e3])
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_the_average_at_any_scale(causal, scale, form):
    q, k, v = inputs(2, 70, scale)
    o, _ = average(q, k, v, empty(2), causal=causal, cu_seqlens=None, form=form)
    torch.testing.assert_close(o, dense(q, k, v, causal), atol=1e-9, rtol=1e-9)


def test_weak_features_of_the_keys_are_there_for_the_queries_that_ask_for_them():
    """In float32, where one maximum for all features would leave nothing of the weak ones."""
    q, k, v = inputs(1, 40, dtype=torch.float32)
    offset = torch.tensor([0.0, 0.0, 500.0, 0.0, 0.0])
    o, _ = average(q + 2 * offset, k - offset, v, empty(1, torch.float32), causal=True, cu_seqlens=None, form="auto")
    expected = dense(q.double() + 2 * offset, k.double() - offset, v.double(), True)
    torch.testing.assert_close(o.double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_a_huge_key_in_the_future_changes_no_bit_of_the_past(form):
    q, k, v = inputs(1, 90, dtype=torch.float32)
    changed = k.clone()
    changed[:, 50:] += 1e4
    before, after = (
        average(q, x, v, empty(1, torch.float32), causal=True, cu_seqlens=None, form=form)[0] for x in (k, changed)
    )
    assert torch.equal(before[:, :50], after[:, :50])
    assert not torch.equal(before[:, 50:], after[:, 50:])


def test_a_gradient_reaches_every_part_of_the_state():
    q, k, v = (x.requires_grad_() for x in inputs(1, 4))
    past = average(*inputs(1, 3), empty(1), causal=True, cu_seqlens=None, form="auto")[1]
    past = [leaf.detach().clone().requires_grad_() for leaf in past]

    def run(q, k, v, *past):
        return average(q, k, v, Sums(*past), causal=True, cu_seqlens=None, form="auto")[0]

    assert torch.autograd.gradcheck(run, (q, k, v, *past))


@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 65])
def test_the_running_maximum_is_torchs(length):
    x, start = torch.randn(2, length, HEADS, FEATURES), torch.randn(2, HEADS, FEATURES)
    after, before, last = running_maximum(x, start, None)
    expected = torch.cat([start[:, None], x], 1).cummax(1).values
    assert torch.equal(after, expected[:, 1:])
    assert torch.equal(before, expected[:, :-1])
    assert torch.equal(last, expected[:, -1])


def test_packed_maxima_are_those_of_each_sequence():
    x, start = torch.randn(1, 9, HEADS, FEATURES), torch.randn(3, HEADS, FEATURES)
    bounds = [0, 4, 4, 9]
    packed = running_maximum(x, start, torch.tensor(bounds))
    for n in range(3):
        own = running_maximum(x[:, bounds[n] : bounds[n + 1]], start[n : n + 1], None)
        for together, alone in zip(packed[:2], own[:2], strict=True):
            assert torch.equal(together[:, bounds[n] : bounds[n + 1]], alone)
        assert torch.equal(packed[2][n : n + 1], own[2])
