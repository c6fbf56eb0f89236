"""A grown tensor is a value: nothing that happens later changes it, and growing it costs little."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.nn.cache import append


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 70)), min_size=1, max_size=12))
def test_values_never_change_however_they_are_branched(actions):
    """Each action continues any earlier value by some tokens; all values must stay what they were."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        values = [torch.zeros(2, 0, 3)]
        expected = [values[0].clone()]
        for source, length in actions:
            source %= len(values)
            new = torch.randn(2, length, 3, generator=generator)
            values.append(append(values[source], new))
            expected.append(torch.cat([expected[source], new], dim=1))
        for value, wanted in zip(values, expected, strict=True):
            assert torch.equal(value, wanted)


def test_growing_copies_rarely():
    with torch.no_grad():
        value, places = torch.zeros(1, 0, 2), set()
        for _ in range(1000):
            value = append(value, torch.ones(1, 1, 2))
            places.add(value.data_ptr())
    assert value.shape == (1, 1000, 2)
    assert len(places) < 12


def test_gradients_flow_through():
    past, new = torch.randn(1, 3, 2, requires_grad=True), torch.randn(1, 1, 2, requires_grad=True)
    append(past, new).sum().backward()
    assert past.grad is not None
    assert new.grad is not None
