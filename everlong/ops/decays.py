"""How much of one token is left at another: products of decays inside chunks, and their gradients.

Receivers (queries) read what sources (keys) wrote; between the two lie the decays of the tokens after the source, up to
the receiver. Every weight is the exponential of a sum of log-decays in which nothing is subtracted: a difference of
cumulative sums loses the digits of a weak decay that follows a strong one, and is NaN after a decay to zero.

The sums come from halving. Blocks of 1, 2, 4, ... tokens are paired; a receiver in the second block of a pair sees a
source in the first through the boundary between them, so its weight is the product of two factors: the decay from the
boundary to the receiver and the decay from the source to the boundary, both at most 1 where no log-decay is positive.
With a decay for each channel the factors go into receivers and sources before these are multiplied.

Tensors are those of M chunks of C tokens: receivers `[M, C, r, K]` and sources `[M, C, s, K]`, token by token, so that
a block of tokens is one matrix; their weighted products are `[M, C, r, C, s]`, zero where the source comes after the
receiver. The first receiver of a token reads what this token writes; a second one does not.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

LOG2E = math.log2(math.e)  # exp2 is several times faster than exp on the CPU, above all where the result underflows


class Products(NamedTuple):
    """What a chunk needs to know about its receivers, its sources and the decays between them (or gradients of it)."""

    matrix: Tensor  # [M, C, r, C, s]: receivers times sources
    reach: Tensor  # [M, C, r, K]: receivers under the decay since the chunk's start
    store: Tensor  # [M, C, s, K]: sources under the decay until the chunk's end
    total: Tensor | None  # [M, 1, 1] or [M, K, 1]: the decay of the whole chunk


def multiply(receivers: Tensor, sources: Tensor, decay: "Tensor | Weights | None", *, late: bool) -> Products:
    """The products of receivers and sources under no decay, the weights of one, or log-decays of channels `[M, C, K]`.

    `late` says when the second receivers read: before the decay of their token, else after it.
    """
    if isinstance(decay, Tensor):
        parts = [_multiply_channels(receivers[m], sources[m], decay[m], late) for m in slabs(receivers)]
        return Products(*(torch.cat(part) for part in zip(*parts, strict=True)))
    matrix = _product(receivers, sources)
    if decay is None:
        return Products(_mask(matrix), receivers, sources, None)
    between, reach, store = decay.cast(receivers.dtype)
    return Products(
        _mask(matrix.mul_(between[:, :, None, :, None])),
        receivers * reach[:, :, None, None],
        sources * store[:, :, None, None],
        decay.total[:, None, None],
    )


def multiply_backward(
    receivers: Tensor,
    sources: Tensor,
    decay: "Tensor | Weights | None",
    forward: Products,
    gradient: Products,
    *,
    late: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of receivers, sources and log-decays; of `gradient`, `total` is that of the logarithm.

    `gradient` is used up.
    """
    _mask(gradient.matrix)
    if isinstance(decay, Tensor):
        parts = [
            _multiply_channels_backward(
                receivers[m], sources[m], decay[m], slab_of(forward, m), slab_of(gradient, m), late
            )
            for m in slabs(receivers)
        ]
        of_receivers, of_sources, of_log_decay = zip(*parts, strict=True)
        return torch.cat(of_receivers), torch.cat(of_sources), torch.cat(of_log_decay)
    d_log_decay = None
    if decay is not None:
        assert gradient.total is not None
        d_log_decay = decay.gradient(
            (gradient.matrix * forward.matrix).sum((2, 4)),
            (gradient.reach * forward.reach).sum((2, 3)),
            (gradient.store * forward.store).sum((2, 3)),
            gradient.total.flatten(),
        )
        between, reach, store = decay.cast(receivers.dtype)
        gradient.matrix.mul_(between[:, :, None, :, None])
        gradient.reach.mul_(reach[:, :, None, None])
        gradient.store.mul_(store[:, :, None, None])
    matrix = gradient.matrix.flatten(3).flatten(1, 2)
    d_receivers = gradient.reach.flatten(1, 2).baddbmm_(matrix, sources.flatten(1, 2))
    d_sources = gradient.store.flatten(1, 2).baddbmm_(matrix.mT, receivers.flatten(1, 2))
    return d_receivers.view_as(receivers), d_sources.view_as(sources), d_log_decay


class Weights(NamedTuple):
    """The decays of a chunk as numbers, where all channels share them."""

    between: Tensor  # [M, C, C]: from a source (column) to a receiver (row)
    reach: Tensor  # [M, C]: from the chunk's start to a receiver
    store: Tensor  # [M, C]: from a source to the chunk's end
    total: Tensor  # [M]

    @classmethod
    def of(cls, log_decay: Tensor) -> "Weights":
        sums = Sums(log_decay[..., None], late=False)
        exponent = log_decay.new_full((*log_decay.shape, log_decay.shape[1]), -math.inf)
        exponent.diagonal(dim1=1, dim2=2).zero_()
        for size, reach, store in sums.levels():
            below = corner(exponent[:, :, None, :, None], size, 1, 0)[:, :, :, 0, :, 0]
            torch.add(reach[:, :, :, 0], store[:, :, :, 0].mT, out=below)
        return cls(
            factor(exponent), factor(sums.reach[:, :, 0, 0]), factor(sums.store[:, :, 0, 0]), sums.total_factor()
        )

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """`between`, `reach` and `store` in another dtype: of mixed ones torch first makes copies in the wider."""
        return self.between.to(dtype), self.reach.to(dtype), self.store.to(dtype)

    def gradient(self, between: Tensor, reach: Tensor, store: Tensor, total: Tensor) -> Tensor:
        """The gradient `[M, C]` of log-decays from those of the weights' logarithms.

        The decay of token t is in every weight from a source before t to a receiver at or after t. In float64 the
        difference below counts just these, although the sums also hold the weights that both ends share.
        """
        across = between.sum(2, dtype=torch.float64) - between.sum(1, dtype=torch.float64)
        dtype = self.reach.dtype
        from_start = (across + reach).flip(1).cumsum(1).flip(1).to(dtype)
        to_end = store.to(dtype).cumsum(1).roll(1, 1)
        to_end[:, 0] = 0.0
        return from_start.add_(to_end).add_(total[:, None])


class Sums:
    """Sums of log-decays inside blocks that double: `g [M, C, K]` -> from a block's start, and to its end."""

    def __init__(self, g: Tensor, *, late: bool) -> None:
        self.size = g.shape[1]
        g = g * LOG2E
        self.reach = torch.stack([g, torch.zeros_like(g)], 2) if late else g[:, :, None].clone()  # [M, C, 1 or 2, K]
        self.store = torch.zeros_like(g)[:, :, None]  # [M, C, 1, K]
        self.total = g[:, :, None]  # [M, blocks, 1, K]

    def levels(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For every size of block: views of the sums to receivers in second blocks, and from sources in first blocks.

        `[M, pairs, size, 1 or 2, K]`. When the levels are done the sums are those of the whole chunk.
        """
        for size in block_sizes(self.size):
            reach, store = pairs(self.reach, size)[1], pairs(self.store, size)[0]
            yield size, reach, store
            first, second = self.total[:, 0::2], self.total[:, 1::2]
            reach += first[:, :, None]
            store += second[:, :, None]
            self.total = first + second

    def total_factor(self) -> Tensor:
        """The decay of the whole chunk, `[M]` or `[M, K]`."""
        return factor(self.total[:, 0, 0]).squeeze(-1)


def slabs(receivers: Tensor) -> list[slice]:
    """How many chunks to take at once, so that what is made from them in between stays in the cache: 1 MB a tensor."""
    count = max((1 << 18) // receivers[0].numel(), 1)
    return [slice(start, start + count) for start in range(0, len(receivers), count)]


def slab_of(products: Products, chunks: slice) -> Products:
    """Those of some of the chunks."""
    total = None if products.total is None else products.total[chunks]
    return Products(products.matrix[chunks], products.reach[chunks], products.store[chunks], total)


def _multiply_channels(receivers: Tensor, sources: Tensor, log_decay: Tensor, late: bool) -> Products:
    m, c, r, s = *receivers.shape[:3], sources.shape[2]
    matrix = receivers.new_zeros(m, c, r, c, s)
    matrix[:, :, 0].diagonal(dim1=1, dim2=2).copy_((receivers[:, :, :1] * sources).sum(-1).mT)
    sums = Sums(log_decay, late=late)
    for size, reach, store in sums.levels():
        left = pairs(receivers, size)[1] * factor(reach)
        right = pairs(sources, size)[0] * factor(store)
        below = corner(matrix, size, 1, 0)
        below.copy_(_product(left.flatten(0, 1), right.flatten(0, 1)).view(below.shape))
    reach, store = receivers * factor(sums.reach), sources * factor(sums.store)
    return Products(matrix, reach, store, sums.total_factor().view(m, -1, 1))


def _multiply_channels_backward(
    receivers: Tensor, sources: Tensor, log_decay: Tensor, forward: Products, gradient: Products, late: bool
) -> tuple[Tensor, Tensor, Tensor]:
    assert gradient.total is not None
    sums = Sums(log_decay, late=late)
    d_receivers, d_sources, d_log_decay = (
        torch.zeros_like(receivers),
        torch.zeros_like(sources),
        torch.zeros_like(log_decay),
    )
    for size, reach, store in sums.levels():
        matrix = corner(gradient.matrix, size, 1, 0).flatten(4).flatten(2, 3).flatten(0, 1)
        reach, store = factor(reach), factor(store)
        left, right = pairs(receivers, size)[1] * reach, pairs(sources, size)[0] * store
        d_left = batched(matrix, right.flatten(2, 3).flatten(0, 1)).view_as(left)
        d_right = batched(matrix.mT, left.flatten(2, 3).flatten(0, 1)).view_as(right)
        pairs(d_receivers, size)[1].addcmul_(d_left, reach)
        pairs(d_sources, size)[0].addcmul_(d_right, store)
        first, second = pairs(d_log_decay, size)
        second += _from(left.mul_(d_left), late)
        first += _after(right.mul_(d_right))
    d_receivers.addcmul_(gradient.reach, factor(sums.reach))
    d_sources.addcmul_(gradient.store, factor(sums.store))
    d_log_decay += _from((gradient.reach * forward.reach)[:, None], late)[:, 0]
    d_log_decay += _after((gradient.store * forward.store)[:, None])[:, 0]
    d_log_decay += gradient.total.mT
    own = gradient.matrix[:, :, 0].diagonal(dim1=1, dim2=2).mT  # [M, C, s]
    d_receivers[:, :, 0] += (own[..., None] * sources).sum(2)
    d_sources += own[..., None] * receivers[:, :, :1]
    return d_receivers, d_sources, d_log_decay


def _from(x: Tensor, late: bool) -> Tensor:
    """What the decay of token t adds up of `x [M, pairs, size, r, K]`: receivers from t on, or after t if late."""
    if late:
        return _suffix_sums(x[:, :, :, 0], 0) + _suffix_sums(x[:, :, :, 1], 1)
    return _suffix_sums(_merge(x), 0)


def _after(x: Tensor) -> Tensor:
    """What the decay of token t adds up of `x [M, pairs, size, s, K]`: sources before t."""
    x = _merge(x)
    ones = x.new_ones(x.shape[2], x.shape[2]).tril_(-1)
    return batched(ones.expand(x.shape[0] * x.shape[1], -1, -1), x.flatten(0, 1)).view_as(x)


def _suffix_sums(x: Tensor, diagonal: int) -> Tensor:
    ones = x.new_ones(x.shape[2], x.shape[2]).triu_(diagonal)
    return batched(ones.expand(x.shape[0] * x.shape[1], -1, -1), x.flatten(0, 1)).view_as(x)


def _merge(x: Tensor) -> Tensor:
    return x.squeeze(3) if x.shape[3] == 1 else x.sum(3)


def batched(a: Tensor, b: Tensor) -> Tensor:
    """`[n, i, j] @ [n, j, k]`; where j is 1 or 2, the calls of a matrix product each would cost more than they do."""
    if a.shape[2] > 2:
        return torch.bmm(a, b)
    result = a[:, :, :1] * b[:, :1]
    for j in range(1, a.shape[2]):
        result.addcmul_(a[:, :, j, None], b[:, j, None])
    return result


def _product(receivers: Tensor, sources: Tensor) -> Tensor:
    """`[M, C, r, K]`, `[M, C, s, K]` -> `[M, C, r, C, s]`"""
    matrix = torch.bmm(receivers.flatten(1, 2), sources.flatten(1, 2).mT)
    return matrix.view(*receivers.shape[:3], *sources.shape[1:3])


def _mask(matrix: Tensor) -> Tensor:
    """Zeros, in place, where a source comes after a receiver, or is no earlier than a second receiver."""
    size = matrix.shape[1]
    hidden = torch.ones(size, size, dtype=torch.bool, device=matrix.device).triu(1)
    for receiver in range(matrix.shape[2]):
        matrix[:, :, receiver].masked_fill_(hidden[:, :, None], 0.0)
        hidden = hidden.logical_or(torch.eye(size, dtype=torch.bool, device=matrix.device))
    return matrix


def factor(exponent: Tensor) -> Tensor:
    """2 ** exponent; in float32, 0 where that is next to a denormal number, which makes matrix products crawl."""
    if exponent.dtype == torch.float32:
        exponent = torch.nn.functional.threshold(exponent, -120.0, -math.inf)
    return exponent.exp2()


def block_sizes(size: int) -> list[int]:
    """1, 2, 4, ... up to half of `size`, a power of two."""
    assert size & (size - 1) == 0, size
    return [1 << level for level in range(size.bit_length() - 1)]


def pairs(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Views of the first and the second blocks of all pairs: `[M, C, ...]` -> twice `[M, pairs, size, ...]`."""
    blocks = torch.unflatten(x, 1, (-1, 2, size))
    return blocks[:, :, 0], blocks[:, :, 1]


def corner(matrix: Tensor, size: int, row: int, column: int) -> Tensor:
    """A view of one corner of all pairs: `[M, C, r, C, s]` -> `[M, pairs, size, r, size, s]`.

    Corners (1, 0) of all sizes make up what lies below the diagonal.
    """
    blocks = torch.unflatten(torch.unflatten(matrix, 3, (-1, 2, size)), 1, (-1, 2, size))
    return blocks[:, :, row, :, :, :, column].diagonal(dim1=1, dim2=4).movedim(-1, 1)


def inverse(lower: Tensor) -> Tensor:
    """(I - lower)^-1 for strictly lower triangular `[M, C, C]`, by substitution of blocks.

    A pair of blocks has the inverse [[X, 0], [Y L X, Y]], X and Y those of the blocks on the diagonal, L the corner.
    """
    result = torch.zeros_like(lower)
    result.diagonal(dim1=1, dim2=2).fill_(1.0)
    for size in block_sizes(lower.shape[-1]):
        first, second, below, target = (
            corner(x[:, :, None, :, None], size, row, column)[:, :, :, 0, :, 0]
            for x, row, column in ((result, 0, 0), (result, 1, 1), (lower, 1, 0), (result, 1, 0))
        )
        if size == 1:
            target.copy_(below)
            continue
        product = torch.bmm(second.flatten(0, 1), torch.bmm(below.flatten(0, 1), first.flatten(0, 1)))
        target.copy_(product.view(target.shape))
    return result
