"""From logits to the next token, in steps that are functions of the logits alone.

    repetition penalty  l_i <- l_i / r if l_i > 0 else r l_i, for tokens seen     Keskar et al. 2019, arXiv 1909.05858
    temperature         l <- l / temperature
    top-k               only the k largest                                        Fan et al. 2018, arXiv 1805.04833
    top-p               only the fewest tokens whose probability reaches p        Holtzman et al. 2019, arXiv 1904.09751
    min-p               only tokens at least min_p times as likely as the best    Nguyen et al. 2024, arXiv 2407.01082

They apply in this order, each to what the one before left over. A token that is left out has the logit minus infinity.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from everlong.config import config


@config
class Sampling:
    """How the next token is chosen; the defaults sample from the model's own distribution."""

    temperature: float = 1.0
    """What logits are divided by: below 1 sharper, above 1 flatter; 0 takes the likeliest token (greedy)."""
    top_k: int | None = None
    """Sample from this many of the likeliest tokens; None: from all."""
    top_p: float | None = None
    """Sample from the fewest tokens that together have this probability; None: from all."""
    min_p: float | None = None
    """Sample from tokens at least this many times as likely as the likeliest; None: from all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the text so far become less likely; 1 leaves them as they are."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be at least 0 (0 is greedy) and finite: got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, or left out for all tokens: got {self.top_k}")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"`{name}` must be above 0 and at most 1, or left out: got {value}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"`repetition_penalty` must be above 0 and finite (1 is none): got {self.repetition_penalty}"
            )


def sample(
    logits: Float[Tensor, "B C"],
    sampling: Sampling,
    seen: Bool[Tensor, "B C"] | None,
    generators: Sequence[torch.Generator],
) -> Int[Tensor, " B"]:
    """Chooses a token for each row. A row takes one number from its own generator, and depends on no other row.

    `seen` says which tokens the repetition penalty is for; None: none.

    Raises:
        ValueError: a row of logits is no distribution.
    """
    scores = logits.float() if seen is None else penalize(logits.float(), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return greedy(scores)
    return draw(restrict(scores / sampling.temperature, sampling), generators)


def restrict(logits: Float[Tensor, "B C"], sampling: Sampling) -> Float[Tensor, "B C"]:
    """Leaves out what top-k, top-p and min-p leave out."""
    if sampling.top_k is not None:
        logits = top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = min_p(logits, sampling.min_p)
    return logits


def penalize(logits: Float[Tensor, "B C"], seen: Bool[Tensor, "B C"], penalty: float) -> Float[Tensor, "B C"]:
    """Makes tokens that were seen less likely (`penalty` above 1) or more (below 1)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def top_k(logits: Float[Tensor, "B C"], k: int) -> Float[Tensor, "B C"]:
    """Keeps the `k` largest logits; those equal to the smallest of them stay as well."""
    least = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def top_p(logits: Float[Tensor, "B C"], p: float) -> Float[Tensor, "B C"]:
    """Keeps the fewest tokens, likeliest first, whose probability together is at least `p`."""
    if p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    before[:, 0] = 0.0  # the likeliest stays, whatever rounding makes of the difference
    return logits.masked_fill((before >= p).gather(-1, order.argsort(-1)), -torch.inf)


def min_p(logits: Float[Tensor, "B C"], p: float) -> Float[Tensor, "B C"]:
    """Keeps tokens whose probability is at least `p` times that of the likeliest."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def greedy(logits: Float[Tensor, "B C"]) -> Int[Tensor, " B"]:
    """The likeliest token of each row, the first of equals."""
    best, token = logits.max(-1)
    _check(best.isfinite())
    return token


def draw(logits: Float[Tensor, "B C"], generators: Sequence[torch.Generator]) -> Int[Tensor, " B"]:
    """A token from each row's distribution, by inverting its cumulative sum at a uniform number."""
    uniform = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    cumulative = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    total = cumulative[:, -1:]
    _check(total.isfinite())
    # Below the total also after rounding, so that no token of probability 0 is ever found.
    target = torch.minimum(uniform.to(logits.device)[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def generators(seed: int | Sequence[int], batch: int) -> list[torch.Generator]:
    """A random stream for each sequence: from its own seed, or `seed`, `seed` + 1, ... where one is given for all.

    Raises:
        ValueError: the number of seeds is not the number of sequences, or a seed does not fit into 64 bits.
    """
    seeds = [seed + row for row in range(batch)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch:
        raise ValueError(f"`seed` must be one number, or one for each sequence: got {len(seeds)} for {batch} sequences")
    if any(not 0 <= one < 2**63 for one in seeds):
        raise ValueError(f"`seed` must be at least 0 and below 2^63: got {seed}")
    return [torch.Generator().manual_seed(one) for one in seeds]


def _check(sound: Bool[Tensor, "..."]) -> None:
    if not sound.all():
        raise ValueError("the model's logits are not finite, so there is no next token: its weights are damaged")
