"""Feature maps of linear attention: functions that make queries and keys positive, so that a sum of weights is one."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from everlong.config import unknown

FeatureMap = Callable[[Float[Tensor, "*B K"]], Float[Tensor, "*B F"]]


def elu(x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B K"]:
    """elu(x) + 1, the map of the paper (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7)."""
    return F.elu(x) + 1


def relu(x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B K"]:
    """max(x, 0): sparse features."""
    return F.relu(x)


def squared_relu(x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B K"]:
    """max(x, 0)^2: sparser and more peaked than relu."""
    return F.relu(x).square()


def identity(x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B K"]:
    """x itself. Its weights may be negative, so no normaliser can be formed."""
    return x


_MAPS: dict[str, FeatureMap] = {f.__name__: f for f in (elu, relu, squared_relu, identity)}


def names() -> list[str]:
    """The feature maps that there are."""
    return sorted(_MAPS)


def load(name: str) -> FeatureMap:
    """The feature map of that name; ValueError where there is none."""
    if name not in _MAPS:
        raise unknown("feature map", name, _MAPS)
    return _MAPS[name]
