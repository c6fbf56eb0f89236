"""Prepared data in memory maps, and batches of it whose order is a pure function of (seed, epoch).

An epoch puts the documents in a random order, one after the other, begins somewhere inside the first of them (its head
then comes last), and cuts the whole into windows of `length` tokens, which are served in a random order. Each token is
a target once in an epoch, but for the very first and less than one window at the end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Int64, Integer, UInt64
from torch import Tensor

from everlong.config import config, divisible, unknown
from everlong.data.packing import DatasetInfo, check_whole, read_info
from everlong.data.tokenizer import Tokenizer

DOCUMENTS, WINDOWS, BEGINNING = range(3)  # what is drawn for an epoch, each from random bits of its own


@config
class Position:
    """Where a run stands in its data: all that is needed to go on exactly there, on any number of processes."""

    seed: int = 0
    epoch: int = 0
    index: int = 0  # windows of this epoch that were served, over the global batch


class Shards:
    """Tokens in several files of the same length, to be read like one array."""

    def __init__(self, files: Sequence[np.ndarray], shard_tokens: int) -> None:
        self._files, self._shard_tokens = files, shard_tokens

    def __len__(self) -> int:
        return sum(map(len, self._files))

    def __getitem__(self, span: slice) -> Integer[np.ndarray, " T"]:
        start, stop, _ = span.indices(len(self))
        size = self._shard_tokens
        touched = range(start // size, (stop - 1) // size + 1) if start < stop else range(1)
        parts = [self._files[i][max(0, start - i * size) : max(0, stop - i * size)] for i in touched]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Names(Sequence[str]):
    """The names of documents, decoded when they are asked for."""

    def __init__(self, text: Integer[np.ndarray, " C"], starts: Int64[np.ndarray, " N_plus_1"]) -> None:
        self._text, self._starts = text, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return self._text[self._starts[i] : self._starts[i + 1] - 1].tobytes().decode()


@dataclass(frozen=True)
class TokenSplit:
    """The packed documents of one split; each ends with the end token."""

    tokens: Integer[np.ndarray, " T"] | Shards
    document_starts: Int64[np.ndarray, " N_plus_1"]
    names: Sequence[str]
    bytes: Int64[np.ndarray, " N"]  # of each document's text

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.document_starts) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.document_starts[-1])

    def document(self, index: int) -> Integer[np.ndarray, " T"]:
        """The tokens of one document, with the end token."""
        i = range(len(self))[index]
        return self.tokens[int(self.document_starts[i]) : int(self.document_starts[i + 1])]


class Dataset:
    """A prepared folder."""

    def __init__(self, folder: Path, info: DatasetInfo, tokenizer: Tokenizer) -> None:
        self.folder, self.info, self.tokenizer = folder, info, tokenizer

    @classmethod
    def open(cls, folder: Path | str) -> "Dataset":
        """Opens what `everlong prepare` made.

        Raises:
            ValueError: it is none, is not whole, or its tokenizer is not the one that it was made with.
        """
        info = read_info(folder)
        check_whole(folder, info)
        tokenizer = Tokenizer.load(folder)
        if tokenizer.fingerprint != info.tokenizer:
            raise ValueError(f"the tokenizer in `{folder}` is not the one of its tokens. Prepare the data again")
        return cls(Path(folder), info, tokenizer)

    def split(self, name: str) -> TokenSplit:
        """`train` or `heldout`, mapped into memory.

        Raises:
            ValueError: there is no such split.
        """
        if name not in self.info.splits:
            raise unknown("split", name, self.info.splits)
        dtype = np.dtype(self.info.dtype).newbyteorder("<")
        files = [_map(self.folder / file, dtype) for file in sorted(self.info.files) if _is_shard(file, name)]
        try:
            table = np.load(self.folder / f"{name}.documents.npy")
        except ValueError:  # NumPy speaks of pickles where the file begins with anything else
            raise ValueError(f"`{self.folder / name}.documents.npy` is damaged. Prepare the data again") from None
        tokens = Shards(files, self.info.shard_tokens) if len(files) > 1 else (*files, np.zeros(0, dtype))[0]
        names = Names(_map(self.folder / f"{name}.names.txt", np.dtype(np.uint8)), table[:, 2])
        return TokenSplit(tokens, np.ascontiguousarray(table[:, 0]), names, np.diff(table[:, 1]))


def _is_shard(file: str, split: str) -> bool:
    return file.startswith(f"{split}-") and file.endswith(".bin")


def _map(file: Path, dtype: "np.dtype[Any]") -> np.ndarray:
    """A file as an array that is read when it is used. A plain view: slices of `np.memmap` itself are slow."""
    if not file.stat().st_size:
        return np.zeros(0, dtype)
    return np.memmap(file, dtype, mode="r").view(np.ndarray)


@dataclass(frozen=True)
class Batch:
    """Windows of tokens, and for each token the one that follows it."""

    tokens: Int64[Tensor, "B T"]
    targets: Int64[Tensor, "B T"]
    position: Position  # after this batch
    touched: tuple[Int64[np.ndarray, " _"], ...]  # for each row the numbers of the documents it has tokens of
    names: Sequence[str]

    @cached_property
    def documents(self) -> tuple[tuple[str, ...], ...]:
        """For each row the names of the documents that it has tokens of."""
        return tuple(tuple(self.names[i] for i in dict.fromkeys(row.tolist())) for row in self.touched)


class Loader:
    """Serves batches from a position on, without end.

    Process `rank` of `world` gets the rows `rank::world` of the global batch, so the batches do not depend on how many
    processes there are. A batch that begins in one epoch may end in the next.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        length: int,
        batch_size: int,
        position: Position = Position(),
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Begins at a position.

        Args:
            length: tokens in a row.
            batch_size: rows of the global batch.

        Raises:
            ValueError: the split is shorter than one row, the batch does not divide among the processes, or the
                position lies outside of its epoch.
        """
        divisible("batch_size", batch_size, "world", world)
        if not 0 <= rank < world:
            raise ValueError(f"`rank` must be from 0 to {world - 1}: got {rank}")
        if length < 1:
            raise ValueError(f"`length` must be at least 1: got {length}")
        if split.num_tokens < length + 1:
            raise ValueError(
                f"a row needs {length + 1} tokens, its length and one: the split has {split.num_tokens} in all."
                " Give more text or a smaller length"
            )
        self.split, self.length, self.batch_size = split, length, batch_size
        self.position, self.rank, self.world = position, rank, world
        self._epochs: dict[tuple[int, int], _Epoch] = {}
        if not 0 <= position.index <= self.windows:
            raise ValueError(f"`index` must be from 0 to {self.windows}, the windows of an epoch: got {position.index}")

    @property
    def windows(self) -> int:
        """Windows in an epoch."""
        return (self.split.num_tokens - 1) // self.length

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.next()

    def next(self) -> Batch:
        """This process's rows of the next global batch."""
        batch = self.batch_at(self.position)
        self.position = batch.position
        return batch

    def batch_at(self, position: Position) -> Batch:
        """This process's rows of the global batch that begins at `position`."""
        rows = np.empty((self.batch_size // self.world, self.length + 1), np.int64)
        touched = []
        for row, place in zip(rows, range(self.rank, self.batch_size, self.world), strict=True):
            epochs, index = divmod(position.index + place, self.windows)
            touched.append(self._epoch(position.seed, position.epoch + epochs).read(index, row))
        epochs, index = divmod(position.index + self.batch_size, self.windows)
        after = Position(seed=position.seed, epoch=position.epoch + epochs, index=index)
        tokens = torch.from_numpy(rows)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), after, tuple(touched), self.split.names)

    def _epoch(self, seed: int, epoch: int) -> "_Epoch":
        if (seed, epoch) not in self._epochs:
            # Two are kept, for the batches that go from one into the next.
            self._epochs = dict([*self._epochs.items()][-1:])
            self._epochs[seed, epoch] = _Epoch(self.split, self.length, seed, epoch)
        return self._epochs[seed, epoch]


class _Epoch:
    """The order of one epoch: its documents as one long text, and its windows."""

    def __init__(self, split: TokenSplit, length: int, seed: int, epoch: int) -> None:
        self.length, self.tokens = length, split.tokens
        self.windows = _shuffled((split.num_tokens - 1) // length, seed, epoch, WINDOWS)
        order = _shuffled(len(split), seed, epoch, DOCUMENTS)
        starts, stops = split.document_starts[order], split.document_starts[order + 1]
        # The cuts fall elsewhere in each epoch, also where there is one document only.
        beginning = int(starts[0]) + int(_bits(1, seed, epoch, BEGINNING)[0] % (stops[0] - starts[0]).astype(np.uint64))
        self.documents = np.append(order, order[0])
        self.starts = np.append(starts, starts[0])
        self.starts[0] = beginning
        self.ends = np.append(stops, beginning)
        self.ends -= self.starts
        np.cumsum(self.ends, out=self.ends)  # where in the long text each document ends

    def read(self, index: int, row: Int64[np.ndarray, " length_plus_1"]) -> Int64[np.ndarray, " N"]:
        """Fills `row` with a window's tokens; the numbers of the documents that they are from."""
        place = int(self.windows[index]) * self.length
        first = document = int(self.ends.searchsorted(place, side="right"))
        filled = 0
        while filled < len(row):
            left = int(self.ends[document]) - place
            take = min(left, len(row) - filled)
            size = int(self.ends[document] - (self.ends[document - 1] if document else 0))
            start = int(self.starts[document]) + size - left
            row[filled : filled + take] = self.tokens[start : start + take]
            filled, place, document = filled + take, place + take, document + 1
        return self.documents[first:document]


def _bits(count: int, *stream: int) -> UInt64[np.ndarray, " N"]:
    """Random bits that depend on the stream's numbers alone: NumPy promises never to change what PCG64 gives."""
    seed = [value & (1 << 64) - 1 for value in stream]
    return np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)


def _shuffled(count: int, *stream: int) -> Int64[np.ndarray, " N"]:
    """The numbers below `count` in a random order. (`Generator.permutation` may change between versions of NumPy.)"""
    return _bits(count, *stream).argsort(kind="stable")
