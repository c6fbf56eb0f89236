"""Sequences of unequal lengths: by groups that are alike, and behind caches."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from everlong.nn.cache import append_ragged
from everlong.nn.ragged import Groups


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), min_size=1, max_size=8))
def test_groups_are_batches_and_come_back_in_order(sequences):
    lengths, kinds = zip(*sequences, strict=True)
    row = torch.arange(2 * sum(lengths)).view(1, -1, 2)
    groups = Groups(lengths, kinds)
    batches = groups.batches(row)
    for group, batch in zip(groups.members, batches, strict=True):
        assert {(lengths[n], kinds[n]) for n in group} == {sequences[group[0]]}
        assert batch.shape == (len(group), lengths[group[0]], 2)
    assert torch.equal(groups.row(batches), row)
    firsts = [torch.tensor(group) for group in groups.members]
    assert groups.rows(firsts).tolist() == list(range(len(sequences)))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=5))
def test_what_is_new_stands_behind_what_was_kept(counts):
    kept, lengths = (torch.tensor(column) for column in zip(*counts, strict=True))
    past, new = torch.full((len(counts), 4, 1), -1), torch.full((len(counts), 3, 1), -1)
    for n, (old, fresh) in enumerate(counts):
        past[n, 4 - old :, 0] = torch.arange(old)
        new[n, 3 - fresh :, 0] = torch.arange(old, old + fresh)
    (joined,), real = append_ragged([(past, new)], kept, lengths)
    assert joined.shape[1] == max(old + fresh for old, fresh in counts)
    for row, seen, (old, fresh) in zip(joined, real, counts, strict=True):
        assert row[seen][:, 0].tolist() == list(range(old + fresh))
        assert row[len(row) - old - fresh :, 0].tolist() == list(range(old + fresh))
