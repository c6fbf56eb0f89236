"""What a model has to beat: a byte n-gram with interpolated Witten-Bell smoothing, and `xz -9`.

    p(w | h) = ( c(h w) + N(h) p(w | h') ) / ( c(h) + N(h) )

with c(h w) the number of times that byte w followed the history h, c(h) its sum over w, N(h) the number of different
bytes that followed h, and h' = h without its oldest byte. Below the empty history stands the uniform 1 / 256; a history
that was never seen leaves p(w | h) = p(w | h').

A document begins with order - 1 start symbols, which belong to histories and are never predicted. So a symbol is one of
257, nine bits, an n-gram of up to seven is one 64-bit key, and counting is sorting.

Source    Witten and Bell 1991; Chen and Goodman 1998, technical report TR-10-98, section 2.5 (the interpolated form)
"""

import lzma
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

BITS = 9  # of a symbol in a key: 0 is the start symbol, byte b is b + 1
SYMBOL = (1 << BITS) - 1
LARGEST_ORDER = 63 // BITS
BATCH = 1 << 21  # bytes counted at once: more would take more memory and no less time

Integers: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]


class ByteNGram:
    """p(byte | the `order` - 1 bytes before it in the document), learned by counting."""

    def __init__(self, order: int = 5) -> None:
        """Raises ValueError where an n-gram of that order has no 64-bit key."""
        if not 1 <= order <= LARGEST_ORDER:
            raise ValueError(f"`order` must lie between 1 and {LARGEST_ORDER}: got {order}")
        self.order = order
        self._learn(_NOTHING, _NOTHING)

    def fit(self, documents: Iterable[bytes]) -> "ByteNGram":
        """Counts these documents, and forgets all earlier ones."""
        self._learn(*count(documents, self.order))
        return self

    def _learn(self, keys: Integers, counts: Integers) -> None:
        # Every byte ends one n-gram of the full order, start symbols included, so these counts hold all shorter ones.
        self._tables = [Table.of(*merged(keys & _suffix(n), counts)) for n in range(1, self.order + 1)]

    def probability(self, history: bytes) -> Floats:
        """p(w | history) of all 256 bytes w; `history` is the document so far, of which the end matters."""
        key = 0
        for byte in history[-(self.order - 1) :] if self.order > 1 else b"":
            key = key << BITS | byte + 1
        p = np.full(256, 1 / 256)
        for n, table in enumerate(self._tables):
            p = table.interpolated(key & _suffix(n), p)
        return p

    def log2_probabilities(self, document: bytes) -> Floats:
        """log2 p of each byte of the document, given those before it: minus its length in bits."""
        keys, place = np.unique(ngrams([document], self.order), return_inverse=True)
        found: Floats = self._log2(keys)[place]
        return found

    def bits_per_byte(self, documents: Iterable[bytes]) -> float:
        """The mean of -log2 p over all bytes of all documents.

        Raises:
            ValueError: there is no byte.
        """
        keys, counts = count(documents, self.order)
        if not len(keys):
            raise ValueError("bits per byte are the mean over the bytes of some documents: got none")
        return float(-(counts * self._log2(keys)).sum() / counts.sum())

    def _log2(self, keys: Integers) -> Floats:
        p: Floats = np.full(len(keys), 1 / 256)
        for n, table in enumerate(self._tables, start=1):
            p = table.smoothed(keys & _suffix(n), p)
        return np.log2(p)


@dataclass(frozen=True)
class Table:
    """The n-grams of one order by their histories; all keys ascend."""

    keys: Integers  # [n-grams]
    counts: Integers  # [n-grams], c(h w)
    histories: Integers  # [histories]
    first: Integers  # [histories + 1], where the n-grams of a history begin
    totals: Integers  # [histories], c(h)

    @classmethod
    def of(cls, keys: Integers, counts: Integers) -> "Table":
        """Of different n-grams in ascending order, and how often they occur."""
        followed = keys >> BITS
        first = np.flatnonzero(np.diff(followed, prepend=-1))
        return cls(keys, counts, followed[first], np.append(first, len(keys)), _sums(counts, first))

    def smoothed(self, keys: Integers, lower: Floats) -> Floats:
        """p(w | h) of any n-grams, with p(w | h') in `lower`."""
        if not len(self.keys):
            return lower
        history, seen = _find(self.histories, keys >> BITS)
        place, known = _find(self.keys, keys)
        kinds = self.first[history + 1] - self.first[history]
        p = (self.counts[place] * known + kinds * lower) / (self.totals[history] + kinds)
        return np.where(seen, p, lower)

    def interpolated(self, history: int, lower: Floats) -> Floats:
        """p(w | h) of all 256 bytes after one history, with p(w | h') in `lower`."""
        row = int(np.searchsorted(self.histories, history))
        if row == len(self.histories) or self.histories[row] != history:
            return lower
        followers = slice(self.first[row], self.first[row + 1])
        kinds = self.first[row + 1] - self.first[row]
        p: Floats = kinds * lower
        p[(self.keys[followers] & SYMBOL) - 1] += self.counts[followers]
        p /= self.totals[row] + kinds
        return p


def count(documents: Iterable[bytes], order: int) -> tuple[Integers, Integers]:
    """The different n-grams of all documents in ascending order, and how often each occurs."""
    keys, counts = _NOTHING, _NOTHING
    for batch in _batches(documents):
        found, times = np.unique(ngrams(batch, order), return_counts=True)
        keys, counts = merged(np.concatenate([keys, found]), np.concatenate([counts, times]))
    return keys, counts


def ngrams(documents: Sequence[bytes], order: int) -> Integers:
    """The n-gram that ends at each byte of each document, its oldest symbol in the highest bits."""
    start = np.zeros(order - 1, dtype=np.int64)
    pieces = [piece for text in documents for piece in (start, np.frombuffer(text, dtype=np.uint8) + np.int64(1))]
    symbols = np.concatenate([*pieces, start])
    keys = np.zeros(len(symbols) - len(start), dtype=np.int64)
    for i in range(order):
        keys <<= BITS
        keys |= symbols[i : i + len(keys)]
    return keys[keys & SYMBOL > 0]


def merged(keys: Integers, counts: Integers) -> tuple[Integers, Integers]:
    """Equal keys as one, in ascending order, with the sums of their counts."""
    by_key = np.argsort(keys, kind="stable")
    keys, counts = keys[by_key], counts[by_key]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[first], _sums(counts, first)


def xz_bits_per_byte(documents: Iterable[bytes]) -> float:
    """Bits per byte of the documents, one after another in one file, under `xz -9`.

    Raises:
        ValueError: there is no byte.
    """
    compressor = lzma.LZMACompressor(preset=9)
    size = packed = 0
    for text in documents:
        size += len(text)
        packed += len(compressor.compress(text))
    if not size:
        raise ValueError("bits per byte are the mean over the bytes of some documents: got none")
    return 8 * (packed + len(compressor.flush())) / size


_NOTHING: Integers = np.zeros(0, dtype=np.int64)


def _suffix(length: int) -> int:
    """Masks the last symbols of a key."""
    return (1 << BITS * length) - 1


def _sums(counts: Integers, first: Integers) -> Integers:
    """The sum of each group of counts, given where the groups begin."""
    return np.add.reduceat(counts, first) if len(first) else _NOTHING


def _find(ascending: Integers, wanted: Integers) -> tuple[Integers, npt.NDArray[np.bool_]]:
    """Where each key stands, and whether it is there at all (where not, the place is that of another)."""
    place = np.minimum(np.searchsorted(ascending, wanted), len(ascending) - 1)
    return place, ascending[place] == wanted


def _batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Documents in groups of about `BATCH` bytes."""
    group: list[bytes] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document)
        if size >= BATCH:
            yield group
            group, size = [], 0
    yield group
