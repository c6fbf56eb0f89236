"""How well a model predicts documents that it has not seen.

A document is read from its start, behind the token that ends documents, in windows of a fixed length. Each window after
the first begins `stride` tokens later and scores only what the one before did not, so that every token is scored once,
with at least `length - stride` tokens before it wherever the document has them.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from everlong.data.loader import TokenSplit
from everlong.models.lm import LanguageModel
from everlong.train.precision import Precision, autocast

BATCH_TOKENS = 8192
LOGITS = 1 << 22  # values held at once while scoring: 16 MB


class Bucket(NamedTuple):
    """The mean loss of tokens that had from `first` to `last` tokens of context."""

    first: int
    last: int
    loss: float
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found. The token that ends a document is predicted and counted like any other."""

    loss: float  # nats per token
    accuracy: float  # share of tokens that the model held for the most probable
    tokens: int
    bytes: int  # of the text behind these tokens, in UTF-8
    documents: int
    seconds: float
    loss_by_position: tuple[Bucket, ...]

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """All bits spent over all bytes of text: it does not depend on the tokenizer."""
        return self.loss * self.tokens / math.log(2) / self.bytes

    @property
    def tokens_per_second(self) -> float:
        """Tokens scored over the time that it took."""
        return self.tokens / self.seconds


class Window(NamedTuple):
    """Tokens `start` to `end` of a document are read; those from `scored` on count."""

    document: int
    start: int
    end: int
    scored: int


def windows(length: int, stride: int, tokens: int, document: int = 0) -> Iterator[Window]:
    """The windows over a document of that many tokens."""
    end = min(length, tokens)
    if end:
        yield Window(document, 0, end, 0)
    while end < tokens:
        scored, end = end, min(end + stride, tokens)
        yield Window(document, max(0, end - length), end, scored)


def evaluate(
    model: LanguageModel,
    split: TokenSplit,
    *,
    length: int,
    stride: int | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    precision: Precision = "float32",
    report: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Scores the documents of a split; `max_tokens` takes a fixed sample of them, the last one cut.

    Args:
        length: tokens of a window.
        stride: tokens between the starts of windows, half of the length where it is not given.
        batch_size: windows at a time; it changes the speed only. By default about 8,192 tokens.
        max_tokens: tokens scored at most.
        precision: of the products.
        report: is told how many tokens are scored, and of how many.

    Raises:
        ValueError: a number is out of its range, or there is nothing to score.
    """
    stride = max(1, length // 2) if stride is None else stride
    for name, value in (("length", length), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1: got {value}")
    if not 1 <= stride <= length:
        raise ValueError(f"`stride` must be from 1 to `length`: got stride={stride}, length={length}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"`max_tokens` must be at least 1: got {max_tokens}")
    started = time.perf_counter()
    chosen = sample(split, max_tokens)
    todo = [w for document, tokens in chosen for w in windows(length, stride, tokens, document)]
    if not todo:
        raise ValueError("there is nothing to evaluate: the split holds no documents")
    todo.sort(key=lambda w: w.start - w.end)  # windows of equal length side by side need no padding
    batch_size = max(1, BATCH_TOKENS // length) if batch_size is None else batch_size
    device = next(model.parameters()).device
    edges = torch.tensor([0, *(1 << i for i in range(length.bit_length()))])  # 0, 1, 2-3, 4-7, ...
    sums = torch.zeros(3, len(edges), dtype=torch.float64)  # losses, tokens, correct ones
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(precision, device.type):
            for i in range(0, len(todo), batch_size):
                tokens, targets = _batch(split, todo[i : i + batch_size])
                loss, correct = token_scores(model, tokens.to(device), targets.to(device))
                scored = targets >= 0
                bucket = torch.bucketize(scored.nonzero()[:, 1], edges, right=True) - 1
                values = torch.stack([loss.cpu().double(), torch.ones(len(bucket)).double(), correct.cpu().double()])
                sums.index_add_(1, bucket, values)
                if report is not None:
                    report(int(sums[1].sum()), sum(tokens for _, tokens in chosen))
    finally:
        model.train(was_training)
    total, count, right = (float(x) for x in sums.sum(1))
    return Evaluation(
        loss=total / count,
        accuracy=right / count,
        tokens=int(count),
        bytes=sum(_bytes(split, document, tokens) for document, tokens in chosen),
        documents=len(chosen),
        seconds=time.perf_counter() - started,
        loss_by_position=tuple(
            Bucket(int(first), max(int(first), min(2 * int(first), length) - 1), float(s / n), int(n))
            for first, s, n in zip(edges, sums[0], sums[1], strict=True)
            if n
        ),
    )


def merge(parts: Iterable[Evaluation]) -> Evaluation:
    """One evaluation over the documents of several."""
    parts = list(parts)
    tokens = sum(part.tokens for part in parts)
    buckets: dict[int, list[Bucket]] = {}
    for part in parts:
        for bucket in part.loss_by_position:
            buckets.setdefault(bucket.first, []).append(bucket)
    return Evaluation(
        loss=sum(part.loss * part.tokens for part in parts) / tokens,
        accuracy=sum(part.accuracy * part.tokens for part in parts) / tokens,
        tokens=tokens,
        bytes=sum(part.bytes for part in parts),
        documents=sum(part.documents for part in parts),
        seconds=sum(part.seconds for part in parts),
        loss_by_position=tuple(
            Bucket(first, same[0].last, sum(b.loss * b.tokens for b in same) / n, n)
            for first, same in sorted(buckets.items())
            if (n := sum(b.tokens for b in same))
        ),
    )


def token_scores(
    model: LanguageModel, tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """Loss in nats, and whether the guess was right, of each target of at least 0, in the order of rows."""
    x, _ = model.hidden(tokens)
    scored = targets >= 0
    x, wanted = x[scored], targets[scored]
    rows = max(64, LOGITS // model.config.vocab_size)
    losses, hits = [], []
    for piece, answer in zip(torch.split(x, rows), torch.split(wanted, rows), strict=True):
        logits = model.logits(piece)
        losses.append(F.cross_entropy(logits, answer, reduction="none"))
        hits.append(logits.argmax(-1) == answer)
    return torch.cat(losses), torch.cat(hits)


def sample(split: TokenSplit, max_tokens: int | None) -> list[tuple[int, int]]:
    """Documents and how many of their tokens to score: all, or a fixed random choice of documents up to the limit."""
    sizes = np.diff(split.document_starts)
    order = np.arange(len(sizes)) if max_tokens is None else np.random.default_rng(0).permutation(len(sizes))
    left = split.num_tokens if max_tokens is None else max_tokens
    chosen = []
    for document in order:
        if left <= 0:
            break
        if tokens := min(int(sizes[document]), left):
            chosen.append((int(document), tokens))
            left -= tokens
    return chosen


def _bytes(split: TokenSplit, document: int, tokens: int) -> int:
    """Bytes of a document; of one that was cut, the share that its tokens are."""
    whole = int(split.document_starts[document + 1] - split.document_starts[document])
    return round(int(split.bytes[document]) * tokens / whole)


def _batch(split: TokenSplit, todo: list[Window]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """What the windows read and what is to be predicted; -1 where nothing is."""
    width = max(w.end - w.start for w in todo)
    tokens, targets = np.zeros((len(todo), width), np.int64), np.full((len(todo), width), -1, np.int64)
    for row, w in enumerate(todo):
        document = split.document(w.document)
        read = document[max(0, w.start - 1) : w.end - 1]
        tokens[row, w.end - w.start - len(read) : w.end - w.start] = read
        if w.start == 0:
            tokens[row, 0] = document[-1]
        targets[row, w.scored - w.start : w.end - w.start] = document[w.scored : w.end]
    return torch.from_numpy(tokens), torch.from_numpy(targets)
