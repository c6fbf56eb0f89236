"""Sequences of unequal lengths in one row, brought together as batches of those that are alike."""

from collections.abc import Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor


class Groups:
    """The sequences of a packed row by what they have in common, their lengths above all.

    No sequence is padded, however unequal they are: each group is a batch of its own.
    """

    def __init__(self, lengths: Sequence[int], alike: Sequence[int] | None = None) -> None:
        """`alike`: sequences with different numbers here are kept apart as well."""
        self.lengths = list(lengths)
        found: dict[tuple[int, int], list[int]] = {}
        for n, key in enumerate(zip(self.lengths, alike or [0] * len(self.lengths), strict=True)):
            found.setdefault(key, []).append(n)
        self.members = list(found.values())

    def batches(self, row: Shaped[Tensor, "1 T ..."]) -> list[Tensor]:
        """The tokens of each group, `[M, length, ...]`."""
        pieces = row.split_with_sizes(self.lengths, 1)
        return [torch.cat([pieces[n] for n in group]) for group in self.members]

    def row(self, batches: Sequence[Tensor]) -> Shaped[Tensor, "1 T ..."]:
        """The tokens of all groups in their order in the row; there is at least one group."""
        pieces = [piece for batch in batches for piece in batch.split_with_sizes([1] * len(batch))]
        return torch.cat([pieces[place] for place in self._places()], 1)

    def rows(self, batches: Sequence[Tensor]) -> Shaped[Tensor, "N ..."]:
        """What there is once for each sequence, in their order."""
        together = torch.cat(list(batches))
        return together[torch.tensor(self._places(), device=together.device)]

    def _places(self) -> list[int]:
        """Where each sequence stands among the members of the groups."""
        order = [n for group in self.members for n in group]
        return sorted(range(len(order)), key=order.__getitem__)
