"""What the operators are timed against: torch's attention, fla-core's loops, and scans as one writes them in torch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.lab.bench.errors import naive


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention by torch, in its own layout `[B, H, T, K]`."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_inputs(length: int, *, batch: int = 1, heads: int = 8, size: int = 64) -> list[Tensor]:
    """q, k and v for it."""
    torch.manual_seed(0)
    return [torch.randn(batch, heads, length, size) for _ in range(3)]


def fla_gated_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    """The gated delta rule by fla-core in chunks of 64, without kernels.

    Raises:
        ValueError: fla-core is not installed.
    """
    o: Tensor = naive("fla/ops/gated_delta_rule/naive.py").naive_chunk_gated_delta_rule(q, k, v, decay, beta)[0]
    return o


def _discretized(u: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and what enters, both `[B, T, D, N]`."""
    return torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None]


def sequential_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The selective scan, step by step in Python."""
    decay, entering = _discretized(u, dt, A, B)
    h, states = torch.zeros_like(entering[:, 0]), []
    for fading, new in zip(decay.unbind(1), entering.unbind(1), strict=True):
        h = fading * h + new
        states.append(h)
    return torch.einsum("btdn,btn->btd", torch.stack(states, 1), C)


def associative_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The selective scan as a tree of pairs: O(T) work in O(log T) operations (Blelloch 1990)."""
    return torch.einsum("btdn,btn->btd", _scanned(*_discretized(u, dt, A, B)), C)


def _scanned(decay: Tensor, entering: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + entering_t along axis 1: the states behind pairs of steps first, then those between."""
    length = decay.shape[1]
    if length == 1:
        return entering
    pairs = length // 2
    first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    behind = _scanned(decay[:, second] * decay[:, first], decay[:, second] * entering[:, first] + entering[:, second])
    between = decay[:, 2::2] * behind[:, : (length - 1) // 2] + entering[:, 2::2]
    evens = torch.cat([entering[:, :1], between], 1)
    h = torch.stack([evens[:, :pairs], behind], 2).flatten(1, 2)
    return torch.cat([h, evens[:, pairs:]], 1)
