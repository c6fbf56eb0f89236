"""What the mixers made of gated attention units share: options, norm, heads of one projection, weights of pairs.

The weight of a key for a query, of scores x = q^T k with s channels, n keys counted and a bias b(distance), 0 if none:

    relu2_n2         relu(x / n + b)^2                          Hua et al. 2022, arXiv 2202.10447, appendix
    relu2_n2_bias    relu((x + b) / n)^2                        the same as FLASH-pytorch has it in its GAU
    relu2_ns         relu(x + b)^2 / (n s)                      Su 2022, kexue.fm/archives/8934
    laplace          laplace(x / n + b)                         Ma et al. 2022, "Mega", arXiv 2209.10655, eq. 16
    softmax          softmax(x / sqrt(s) + b)
    softmax_plus     softmax(x / sqrt(s) ln(max(l, 16)) / ln(512) + b), l the keys that the query sees: the entropy
                     stays the same as texts grow                Su 2022, kexue.fm/archives/9019
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from everlong.config import config
from everlong.nn import positions
from everlong.nn.elementwise_attention import Function, elementwise_attention
from everlong.nn.layers import exact
from everlong.nn.positions.attending import LIMIT

Weights = Literal["relu2_n2", "relu2_n2_bias", "relu2_ns", "laplace", "softmax", "softmax_plus"]
Norm = Literal["scale", "layer", "none"]

EPS = 1e-5  # of the norms


@config
class GatedOptions:
    """What the options of mixers made of gated attention units begin with."""

    width: int
    key_size: int = 128
    """s: channels of queries and keys, of which there is one head."""
    expansion: float = 2.0
    """e / width: channels of values and gate."""
    weights: Weights = "relu2_ns"
    """Of pairs: relu2_n2 as in the paper, relu2_ns, relu2_n2_bias, laplace, softmax or softmax_plus."""
    position: positions.Position = "rope"
    relative_bias: positions.Position = "none"
    """An encoding that adds to the scores beside `position`: t5 or rotary_bias as in the paper, or alibi."""
    norm: Norm = "scale"
    """Of the layer's input: scale, layer, or none where the block norms the sum (block = post)."""
    causal: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        if self.width < 1 or self.key_size < 1:
            raise ValueError(
                f"`width` and `key_size` must be at least 1: got width={self.width}, key_size={self.key_size}"
            )
        if self.inner < 1:
            raise ValueError(
                f"`expansion` must leave at least one channel: got width={self.width}, expansion={self.expansion}"
            )

    @property
    def inner(self) -> int:
        """e: channels of values and gate."""
        return int(self.expansion * self.width)

    def encoding(self, mixer: str, offered: frozenset[str]) -> "PairEncoding":
        """Both encodings of positions as one, with first weights.

        Raises:
            ValueError: one of them acts through a hook that is not offered.
        """
        parts = [
            positions.attach(
                asked, num_heads=1, size=self.key_size, offered=hooks, mixer=f"{mixer}{option}", causal=self.causal
            )
            for asked, hooks, option in (
                (self.position, offered, ""),
                (self.relative_bias, frozenset({"score bias"}), "`'s `relative_bias"),
            )
        ]
        return PairEncoding(parts, self.key_size)

    def parameters(self, num_heads: int) -> int:
        """Of the norm, the projections and so many heads; without those of positions."""
        d, e, s = self.width, self.inner, self.key_size
        norm = {"scale": 1, "layer": 2 * d, "none": 0}[self.norm]
        return norm + d * (3 * e + s) + 2 * num_heads * s + (2 * e + s + d if self.bias else 0)


class ScaleNorm(nn.Module):
    """g x / max(|x| / sqrt(D), eps): one learned length for all (Nguyen and Salazar 2019, arXiv 1910.05895)."""

    def __init__(self, eps: float = EPS) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(()))

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        size = torch.linalg.vector_norm(exact(x), dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        y: Tensor = x * (self.weight / size.clamp_min(self.eps)).to(x.dtype)
        return y


def make_norm(norm: Norm, width: int) -> nn.Module:
    """The norm of that name."""
    if norm == "scale":
        return ScaleNorm()
    return nn.LayerNorm(width, eps=EPS) if norm == "layer" else nn.Identity()


class OffsetScale(nn.Module):
    """Heads of one vector: each scales its channels by gamma and moves them by beta."""

    def __init__(self, num_heads: int, size: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(1 + 0.02 * torch.randn(num_heads, size))
        self.beta = nn.Parameter(torch.zeros(num_heads, size))

    def forward(self, z: Float[Tensor, "*B S"]) -> Float[Tensor, "*B H S"]:
        return torch.addcmul(self.beta, z[..., None, :], self.gamma)


class PairEncoding(positions.PositionEncoding):
    """Several encodings for the one head of a unit. Scores are scaled before: what they add is never scaled."""

    def __init__(self, parts: list[positions.PositionEncoding], size: int) -> None:
        super().__init__(1, size)
        self.parts = nn.ModuleList(parts)
        self.hooks = frozenset().union(*(part.hooks for part in parts))

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def biased(self) -> bool:
        """Whether scores get a bias, for which the positions of keys are asked when they are read."""
        return "score bias" in self.hooks

    def rotate(self, x: Float[Tensor, "B T H K"], positions: Int[Tensor, "rows T"]) -> Float[Tensor, "B T H K"]:
        for part in self.parts:
            x = part.rotate(x, positions)  # type: ignore[operator]
        return x

    def score_bias(self, queries: Int[Tensor, "*rows T"], keys: Int[Tensor, "*rows S"]) -> Float[Tensor, "..."]:
        biases = [part.score_bias(queries, keys) for part in self.parts if "score bias" in part.hooks]  # type: ignore
        total: Tensor = sum(biases[1:], biases[0])
        return total


def factors(
    weights: Weights, count: int | None, visible: Float[Tensor, "rows T"], size: int
) -> tuple[Float[Tensor, "rows T"], bool]:
    """What the scores of each query are multiplied by, and whether their biases are as well."""
    n = visible.clamp_min(1) if count is None else torch.full_like(visible, count)
    if weights == "softmax":
        return torch.full_like(visible, size**-0.5), False
    if weights == "softmax_plus":
        return visible.clamp_min(16).log() * (size**-0.5 / math.log(512)), False
    if weights == "relu2_ns":
        return (n * size).rsqrt(), True
    return n.reciprocal(), weights == "relu2_n2_bias"


def attend(
    weights: Weights,
    q: Float[Tensor, "N T K"],
    k: Float[Tensor, "N S K"],
    v: Float[Tensor, "N S V"],
    *,
    count: int | None,
    position: PairEncoding,
    queries: Int[Tensor, "rows T"],
    keys: Int[Tensor, "rows S"] | None,
    counted: bool,
    real: Bool[Tensor, "N S"] | None = None,
    causal: bool = True,
    form: str = "auto",
) -> Float[Tensor, "N T V"]:
    """What each query reads of the values; queries are the last of the keys, all rotated already.

    Args:
        count: n; None: the number of keys that a query sees.
        queries, keys: positions, asked for where the encoding adds to scores.
        counted: positions of neighbours differ by one.
        real: which keys are there at all, the last ones of each row; None: all.
    """
    (T, S), dtype = (q.shape[1], k.shape[1]), v.dtype
    kind = torch.promote_types(dtype, torch.float32)
    visible = torch.arange(S - T + 1, S + 1, device=q.device, dtype=kind) if causal else q.new_full((T,), S, dtype=kind)
    visible = visible[None] if real is None else visible - (~real).sum(1, keepdim=True)
    factor, shared = factors(weights, count, visible, q.shape[2])
    q, k = (q * factor[..., None]).to(dtype), k.to(dtype)
    if weights in ("softmax", "softmax_plus"):
        o = positions.attend(
            position,
            q[:, :, None],
            k[:, :, None],
            v[:, :, None],
            queries=queries,
            keys=keys,
            counted=counted,
            project=(nn.Identity(), nn.Identity()),
            causal=causal,
            real=real,
            form=form,
        )
        return o[:, :, 0]
    if real is not None:  # a value of 0 adds nothing, whatever its weight
        v = v * real[..., None]
    function: Function = "laplace" if weights == "laplace" else "relu2"
    gain = factor if shared else None

    def read(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, gain: Tensor | None) -> Float[Tensor, "N T V"]:
        return elementwise_attention(q, k, v, function=function, bias=bias, gain=gain, causal=causal, form=form)

    if not position.biased or not q.numel():
        return read(q, k, v, None, None)
    if counted:
        zero = torch.zeros(1, dtype=torch.long, device=q.device)
        distances = torch.arange(1 - S, 1 if causal else T, device=q.device)
        return read(q, k, v, position.score_bias(zero, distances).flatten().to(kind), gain)
    assert keys is not None
    rows = max(1, LIMIT // (S * max(len(queries), len(keys))))
    outputs = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        last = stop + S - T if causal else S
        own, seen, places = queries[:, start:stop], keys[:, :last], slice(start, stop)

        def part(
            q: Tensor, k: Tensor, v: Tensor, own: Tensor, seen: Tensor, gain: Tensor | None
        ) -> Float[Tensor, "N T V"]:
            return read(q, k, v, position.score_bias(own, seen)[:, 0].to(kind), gain)

        inputs = q[:, places], k[:, :last], v[:, :last], own, seen, None if gain is None else gain[:, places]
        if rows < T and torch.is_grad_enabled():  # made again in the backward pass: it is a matrix [T, S]
            outputs.append(checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(part(*inputs))
    return torch.cat(outputs, 1)


def weigh(
    weights: Weights,
    scores: Float[Tensor, " S"],
    bias: Float[Tensor, " S"],
    *,
    count: int,
    size: int,
) -> Float[Tensor, " S"]:
    """The weights of the keys that one query sees, as the formulas at the top say."""
    if weights == "relu2_n2":
        return F.relu(scores / count + bias) ** 2
    if weights == "relu2_n2_bias":
        return F.relu((scores + bias) / count) ** 2
    if weights == "relu2_ns":
        return F.relu(scores + bias) ** 2 / (count * size)
    if weights == "laplace":
        return (1 + torch.erf((scores / count + bias - 0.5**0.5) * (2 * math.pi) ** 0.5)) / 2
    if weights == "softmax_plus":
        scores = scores * math.log(max(len(scores), 16)) / math.log(512)
    return torch.softmax(scores / size**0.5 + bias, 0)
