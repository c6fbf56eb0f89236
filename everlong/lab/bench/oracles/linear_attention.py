"""Linear attention against flash-linear-attention's loops, and otherwise against the papers' weights as a matrix."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.lab.bench.comparison import Comparison, make
from everlong.lab.bench.errors import heads_first, naive
from everlong.mixers import Mixer

ORACLE = "fla-core, linear_attn, based and rebased naive.py; otherwise the papers' weights as a dense matrix"


def comparisons() -> Iterator[Comparison]:
    """Each feature map, the first at three lengths; then the other direction as well."""
    for length in (1, 7, 130):
        yield _fla(length, "elu", lambda x: F.elu(x) + 1)
    yield _fla(65, "squared_relu", lambda x: x.relu().square())
    yield _fla(65, "exp", torch.exp)
    yield _fla(65, "cosine", lambda x: torch.cat([torch.ones_like(x[..., :1]), F.normalize(x, dim=-1)], -1))
    yield _scores("taylor", "fla/ops/based/naive.py", "naive_parallel_based", scale=4**-0.5)
    # Theirs adds 1e-6 to the sum of weights: a large scale, which cancels otherwise, makes little of that.
    yield _scores("quadratic", "fla/ops/rebased/naive.py", "naive_parallel_rebased", scale=1e3)
    yield _cosformer()
    yield _dense()
    yield _efficient()


def _heads(mixer: Mixer, x: Tensor, heads: int) -> list[Tensor]:
    return [getattr(mixer, label)(x).unflatten(-1, (heads, -1)) for label in "qkv"]


def _out(mixer: Mixer, o: Tensor) -> Tensor:
    y: Tensor = mixer.get_submodule("o")(o.flatten(-2))
    return y


def _fla(length: int, name: str, phi: Callable[[Tensor], Tensor]) -> Comparison:
    ours = make("linear_attention", width=48, num_heads=3, feature_map=name)
    run = naive("fla/ops/linear_attn/naive.py").naive_recurrent_linear_attn

    def theirs(x: Tensor) -> Tensor:
        q, k, v = _heads(ours, x, 3)
        return _out(ours, run(phi(q), phi(k), v, normalize=True)[0])

    return Comparison(f"{name}, T={length}", lambda x: ours(x)[0], theirs, torch.randn(2, length, 48))


def _scores(name: str, path: str, function: str, *, scale: float) -> Comparison:
    ours = make("linear_attention", width=48, num_heads=3, feature_map=name, feature_size=4)
    run = getattr(naive(path), function)

    def theirs(x: Tensor) -> Tensor:
        return _out(ours, run(*heads_first(*_heads(ours, x, 3)), scale=scale).transpose(1, 2))

    return Comparison(name, lambda x: ours(x)[0], theirs, torch.randn(2, 130, 48))


def _cosformer() -> Comparison:
    ours = make("linear_attention", width=24, num_heads=2, feature_map="cosformer", max_length=40).double()

    def theirs(x: Tensor) -> Tensor:
        q, k, v = _heads(ours, x, 2)
        place = torch.arange(x.shape[1], dtype=x.dtype)
        weights = torch.einsum("bthk,bshk->bhts", q.relu(), k.relu()).tril()
        weights = weights * torch.cos((place[:, None] - place) * (math.pi / 80))
        return _out(ours, torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True).clamp_min(1e-12), v))

    return Comparison(
        "cosformer", lambda x: ours(x)[0], theirs, torch.randn(2, 37, 24, dtype=torch.float64), bound=1e-9
    )


def _dense() -> Comparison:
    ours = make("linear_attention", width=24, num_heads=2, causal=False).double()

    def theirs(x: Tensor) -> Tensor:
        q, k, v = _heads(ours, x, 2)
        weights = torch.einsum("bthk,bshk->bhts", F.elu(q) + 1, F.elu(k) + 1)
        return _out(ours, torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), v))

    x = torch.randn(2, 17, 24, dtype=torch.float64)
    return Comparison("bidirectional", lambda x: ours(x)[0], theirs, x, bound=1e-9)


def _efficient() -> Comparison:
    ours = make("linear_attention", width=24, num_heads=2, feature_map="softmax", causal=False).double()

    def theirs(x: Tensor) -> Tensor:
        q, k, v = heads_first(*_heads(ours, x, 2))
        return _out(ours, (q.softmax(-1) @ (k.softmax(-2).mT @ v)).transpose(1, 2))

    x = torch.randn(2, 17, 24, dtype=torch.float64)
    return Comparison("softmax", lambda x: ours(x)[0], theirs, x, bound=1e-9)
