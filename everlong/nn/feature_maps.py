"""Feature maps of linear attention: functions whose product phi(q)^T phi(k) is the weight that a query gives to a key.

    elu            max(x, 0) + exp(min(x, 0))         elu(x) + 1                        Katharopoulos et al. 2020, eq. 7
    relu           max(x, 0)
    squared_relu   max(x, 0)^2
    exp            exp(x)                             weights sum_f exp(q_f + k_f)
    softmax        softmax over channels of q, over the length of k                     Shen et al. 2018, eq. 5
    taylor         [1, x, x x^T / sqrt(2)]            weights 1 + s + s^2 / 2           Arora et al. 2024, section 3
    quadratic      x x^T                              weights s^2                       Aksenov et al. 2024
    cosine         [1, x / |x|]                       weights 1 + cos(q, k)             Su 2020
    cosformer      relu(x) [cos a_t, sin a_t]         relu(q) relu(k) cos(a_i - a_j)    Qin et al. 2022, eq. 10
    identity       x                                  weights q^T k

with s = q^T k / sqrt(K), a_t = pi t / 2 M.

Sources   arXiv 2006.16236 (elu), 1812.01243 (softmax), 2402.18668 (taylor: Based), 2402.10644 (quadratic: ReBased),
          2202.08791 (cosformer); kexue.fm/archives/7546 (cosine)
Deviates  of x x^T only one half and the diagonal are kept, weighted so that products stay the same: K (K + 1) / 2
          features in the place of K^2; ReBased's norm and scale before its square are left out
"""

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from everlong.config import unknown
from everlong.nn.layers import exact

Place = Literal["before", "after", "nowhere"]


class FeatureMap:
    """What every map is: features of queries and keys, and how they are to be used. The methods here are the identity.

    `channels` is K, that of a query's or key's head; `max_length` is M of cosFormer.
    """

    normalized: ClassVar[bool] = True  # weights are divided by their sum, which must not be negative
    causal: ClassVar[bool] = True  # a key's features are known before what comes after it
    logarithmic: ClassVar[bool] = False  # what is returned are the features' logarithms
    rotation: ClassVar[Place] = "after"  # of the map: where positions may turn queries and keys

    def __init__(self, channels: int, max_length: int = 0) -> None:
        self.channels, self.max_length = channels, max_length

    @property
    def size(self) -> int:
        """Features of a head."""
        return self.channels

    def __call__(
        self, x: Float[Tensor, "*B H K"], positions: Int[Tensor, "*rows"] | None = None
    ) -> Float[Tensor, "*B H F"]:
        """The features of queries or keys at these positions, in float32 at least."""
        return exact(x)

    def similarity(self, q: Float[Tensor, "H K"], k: Float[Tensor, "H K"], distance: int = 0) -> Float[Tensor, " H"]:
        """The weight that a query gives to a key so many positions away, as the paper writes it."""
        return (self(q) * self(k)).sum(-1)


class Elu(FeatureMap):
    """elu(x) + 1, as a sum that does not cancel: so it stays positive far below 0."""

    def __call__(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        x = exact(x)
        return F.relu(x) + x.clamp_max(0.0).exp()

    def similarity(self, q: Tensor, k: Tensor, distance: int = 0) -> Tensor:
        return ((F.elu(q) + 1) * (F.elu(k) + 1)).sum(-1)


class Relu(FeatureMap):
    """max(x, 0): sparse features."""

    def __call__(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return F.relu(exact(x))


class SquaredRelu(FeatureMap):
    """max(x, 0)^2: sparser and more peaked than relu."""

    def __call__(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return F.relu(exact(x)).square()


class Identity(FeatureMap):
    """x itself. Its weights may be negative, so no normaliser can be formed."""

    normalized = False


class Exp(FeatureMap):
    """exp(x), given as its logarithm: nn/exponentials.py holds the sums so that nothing overflows."""

    logarithmic = True
    rotation = "nowhere"  # each feature fades in its own way, which a turn of two of them would mix

    def similarity(self, q: Tensor, k: Tensor, distance: int = 0) -> Tensor:
        return (q + k).exp().sum(-1)


class Softmax(FeatureMap):
    """Efficient attention: each feature is a distribution over the tokens, each query one over the features.

    This is the query's side; a key's is `over_length`, which needs the whole sequence.
    """

    normalized = False  # the weights of a query already sum to one
    causal = False

    def __call__(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return exact(x).softmax(-1)

    @staticmethod
    def over_length(
        k: Float[Tensor, "B T H K"], cu_seqlens: Int[Tensor, " N_plus_1"] | None
    ) -> Float[Tensor, "B T H K"]:
        """Each channel's softmax over the tokens of its sequence."""
        if cu_seqlens is None:
            return exact(k).softmax(1)
        return torch.cat([part.softmax(1) for part in torch.split(exact(k), cu_seqlens.diff().tolist(), dim=1)], dim=1)


class Taylor(FeatureMap):
    """The exponential's series up to its square, around 0: positive for all scores, at least 1/2."""

    rotation = "before"

    @property
    def size(self) -> int:
        return 1 + self.channels + self.channels * (self.channels + 1) // 2

    def __call__(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        x = exact(x) * self.channels**-0.25
        return torch.cat([torch.ones_like(x[..., :1]), x, products(x) * 0.5**0.5], -1)

    def similarity(self, q: Tensor, k: Tensor, distance: int = 0) -> Tensor:
        score = (q * k).sum(-1) / math.sqrt(self.channels)
        return 1 + score + score.square() / 2


class Quadratic(FeatureMap):
    """The square of the score."""

    rotation = "before"

    @property
    def size(self) -> int:
        return self.channels * (self.channels + 1) // 2

    def __call__(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return products(exact(x) * self.channels**-0.25)

    def similarity(self, q: Tensor, k: Tensor, distance: int = 0) -> Tensor:
        return (q * k).sum(-1).square() / self.channels


class Cosine(FeatureMap):
    """One and the direction: a softmax whose exponential ends after the first order, which |s| <= 1 keeps positive."""

    rotation = "before"

    @property
    def size(self) -> int:
        return 1 + self.channels

    def __call__(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        x = exact(x)
        return torch.cat([torch.ones_like(x[..., :1]), direction(x)], -1)

    def similarity(self, q: Tensor, k: Tensor, distance: int = 0) -> Tensor:
        return 1 + F.cosine_similarity(q, k, dim=-1)


class CosFormer(FeatureMap):
    """relu, under a cosine that lets weights fall with the distance up to M."""

    rotation = "nowhere"  # positions are in the features

    @property
    def size(self) -> int:
        return 2 * self.channels

    def __call__(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        assert positions is not None
        self._check(positions)
        x = F.relu(exact(x))
        angle = positions.to(x.dtype)[..., None, None] * (math.pi / 2 / self.max_length)
        return torch.cat([x * angle.cos(), x * angle.sin()], -1)

    def similarity(self, q: Tensor, k: Tensor, distance: int = 0) -> Tensor:
        return (F.relu(q) * F.relu(k)).sum(-1) * math.cos(math.pi * distance / 2 / self.max_length)

    def _check(self, positions: Tensor) -> None:
        if torch.compiler.is_compiling() or not positions.numel() or int(positions.max()) < self.max_length:
            return
        raise ValueError(
            f"cosFormer's weights are positive below `max_length` only: got max_length={self.max_length:,} and "
            f"{int(positions.max()) + 1:,} tokens. Give less, or a model with a larger max_length"
        )


def products(x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B F"]:
    """The entries of x x^T on and above the diagonal; those above count double in a product, so sqrt(2) in a vector."""
    row, column = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    weight = x.new_tensor(2.0).sqrt().where(row != column, 1.0)
    return x[..., row] * x[..., column] * weight


def direction(x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B K"]:
    """x at length one, however small or large; zero stays zero, with no gradient."""
    largest = x.detach().abs().amax(-1, keepdim=True)
    x = x / largest.masked_fill(largest == 0, 1.0)
    length = x.square().sum(-1, keepdim=True)
    return x * length.masked_fill(length == 0, torch.inf).rsqrt()


_MAPS: dict[str, type[FeatureMap]] = {
    "elu": Elu,
    "relu": Relu,
    "squared_relu": SquaredRelu,
    "exp": Exp,
    "softmax": Softmax,
    "taylor": Taylor,
    "quadratic": Quadratic,
    "cosine": Cosine,
    "cosformer": CosFormer,
    "identity": Identity,
}


def names() -> list[str]:
    """The feature maps that there are."""
    return sorted(_MAPS)


def load(name: str) -> type[FeatureMap]:
    """The feature map of that name; ValueError where there is none."""
    if name not in _MAPS:
        raise unknown("feature map", name, _MAPS)
    return _MAPS[name]
