"""Preparation: from sources of text to a folder of packed tokens that training maps into memory.

    dataset.json                              what is here, from what and how it was made, every file's size and SHA-256
    tokenizer.json  tokenizer_config.json     the tokenizer
    train-00000.bin  train-00001.bin  ...     tokens, little endian; each document is followed by the end token
    train.documents.npy                       [N + 1, 3]: where each document begins among the tokens, bytes and names
    train.names.txt                           the names, one a line
    heldout-*.bin  heldout.*                  the same for what training never sees

Documents are read once and spooled on the disk, so that memory does not grow with them. The same texts and options give
the same files, byte for byte.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from everlong.config import config, from_dict, to_dict
from everlong.data.disk import digest, naming, sync
from everlong.data.sources import Skipped, documents
from everlong.data.spool import Parts, Piece, Spool, Tell, split
from everlong.data.tokenizer import Tokenizer, check_vocab_size, train_tokenizer

VERSION = 1
FILE = "dataset.json"
SHARD_TOKENS = 100_000_000
TRAINING_BYTES = 64 << 20  # of text, at most, that a tokenizer is trained on
BATCH = 2 << 20  # characters that are encoded at a time


@config
class Options:
    """What a preparation's result depends on, beside the texts."""

    vocab_size: int | None  # None where the tokenizer was given
    tokenizer: str | None  # the fingerprint of the one given
    held_out: float
    seed: int


@config
class SplitInfo:
    documents: int
    tokens: int  # an end token for each document included
    bytes: int  # of the texts


@config
class FileInfo:
    bytes: int
    sha256: str


@config
class DatasetInfo:
    """What `dataset.json` says of a prepared folder."""

    version: int
    sources: tuple[str, ...]
    texts: str  # SHA-256 of all names and texts
    options: Options
    tokenizer: str  # its fingerprint
    vocab_size: int  # of the tokenizer, at most what was asked for
    end: int
    dtype: Literal["uint16", "uint32"]
    shard_tokens: int
    splits: dict[str, SplitInfo]
    files: dict[str, FileInfo]

    @property
    def fingerprint(self) -> str:
        """Equal for folders with the same tokens: it stands for the texts, the options and the format."""
        made_of = {"version": self.version, "texts": self.texts, "options": to_dict(self.options)}
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


Stage = Literal["reading", "training the tokenizer", "encoding"]


@dataclass(frozen=True)
class Progress:
    """How far a preparation is."""

    stage: Stage
    done: int  # bytes of text
    total: int | None  # not known while sources are read


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Preparation:
    """What `prepare` did."""

    info: DatasetInfo
    reused: bool  # the folder held this very result already
    skipped: tuple[Skipped, ...]
    seconds: dict[str, float]  # of each stage that ran

    @property
    def megabytes_per_second(self) -> float:
        """Text through the whole preparation."""
        total = sum(split.bytes for split in self.info.splits.values())
        return total / 1e6 / max(sum(self.seconds.values()), 1e-9)


def prepare(
    sources: str | Path | Sequence[str | Path],
    folder: str | Path,
    *,
    vocab_size: int = 4096,
    tokenizer: Tokenizer | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    text_field: str = "text",
    report: Report | None = None,
) -> Preparation:
    """Prepares sources into `folder`, which appears whole at the end or not at all.

    The share `held_out` of the documents is kept from training: those whose names hash lowest under `seed`. With fewer
    than 10 documents it is the end of each long one, cut at a line. The tokenizer is trained on the training part only.

    Args:
        tokenizer: used instead of training one; `vocab_size` is then its own.
        held_out: a share from 0 to 1.
        text_field: of the rows of JSONL and Parquet.
        report: is told how far the work is.

    Raises:
        ValueError: a source cannot be used (see `documents`), the folder holds something else, or an option is out of
            range.
    """
    folder, clock = Path(folder), _Clock(report)
    if tokenizer is None:
        check_vocab_size(vocab_size)
    if not 0.0 <= held_out <= 1.0:
        raise ValueError(f"`held_out` must be a share from 0 to 1: got {held_out}")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"`seed` must be at least 0 and below 2^63: got {seed}")
    options = Options(
        vocab_size=None if tokenizer else vocab_size,
        tokenizer=tokenizer.fingerprint if tokenizer else None,
        held_out=held_out,
        seed=seed,
    )
    before = _what_is_there(folder)
    skipped: list[Skipped] = []
    with naming(folder), _stage(folder) as stage:
        spool = Spool(stage)
        with clock.stage("reading") as tell:
            spool.fill(documents(sources, text_field=text_field, skip=skipped.append), tell)
        if before:
            _check_same(folder, before, options, spool.digest)
            return Preparation(before, True, tuple(skipped), clock.seconds)
        train, heldout = split(spool, held_out, seed)
        if tokenizer is None:
            with clock.stage("training the tokenizer") as tell:
                tokenizer = _train(spool, train, vocab_size, tell)
        with clock.stage("encoding") as tell:
            packer = _Packer(stage, spool, tokenizer, tell)
            splits = {"train": packer.pack("train", train), "heldout": packer.pack("heldout", heldout)}
            tokenizer.save(stage)
            spool.remove()
            info = DatasetInfo(
                version=VERSION,
                sources=tuple(map(str, [sources] if isinstance(sources, str | Path) else sources)),
                texts=spool.digest,
                options=options,
                tokenizer=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                end=tokenizer.end,
                dtype=packer.dtype,
                shard_tokens=SHARD_TOKENS,
                splits=splits,
                files={file.name: _describe(file) for file in sorted(stage.iterdir())},
            )
            _publish(stage, folder, info)
    return Preparation(info, False, tuple(skipped), clock.seconds)


def read_info(folder: str | Path) -> DatasetInfo:
    """What a prepared folder says of itself.

    Raises:
        ValueError: it is none, or of a format that this version does not read.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise ValueError(
            f"`{folder}` is no prepared data, it has no {FILE}. `everlong prepare SOURCE --out DIR` makes it"
        )
    try:
        values = json.loads(file.read_bytes())
        version = values.get("version") if isinstance(values, dict) else None
        if version != VERSION:
            raise ValueError(f"its version is {version}, this everlong reads {VERSION}")
        return from_dict(DatasetInfo, values)
    except ValueError as error:
        raise ValueError(f"`{file}` cannot be used: {error}. Remove the folder and prepare the data again") from None


def check_whole(folder: str | Path, info: DatasetInfo) -> None:
    """Raises ValueError where a file of a prepared folder is missing or has another size than it was written with."""
    for name, known in info.files.items():
        file = Path(folder) / name
        size = file.stat().st_size if file.is_file() else None
        if size != known.bytes:
            found = "is missing" if size is None else f"has {size} bytes instead of {known.bytes}"
            raise ValueError(f"`{file}` {found}. Remove the folder and prepare the data again")


def verify(folder: str | Path) -> DatasetInfo:
    """Reads every file of a prepared folder and compares its SHA-256.

    Raises:
        ValueError: one is missing or was changed; it is named.
    """
    info = read_info(folder)
    check_whole(folder, info)
    for name, known in info.files.items():
        if digest(Path(folder) / name) != known.sha256:
            raise ValueError(f"`{Path(folder) / name}` was changed after it was written. Prepare the data again")
    return info


def _train(spool: Spool, train: Parts, vocab_size: int, tell: Tell) -> Tokenizer:
    if not len(train.spans):
        raise ValueError("nothing is left to train a tokenizer on: hold out less than all, or give a tokenizer")
    return _interruptible(lambda: train_tokenizer(spool.sample(train, TRAINING_BYTES, tell), vocab_size))


def _interruptible(work: Callable[[], Tokenizer]) -> Tokenizer:
    """What `work` returns or raises. It runs in a thread: a library that takes half a minute looks for no signals."""
    done: Future[Tokenizer] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # told where the result is asked for
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result()


class _Packer:
    """Encodes parts of the spool on all cores and writes their tokens."""

    def __init__(self, stage: Path, spool: Spool, tokenizer: Tokenizer, tell: Tell) -> None:
        self.stage, self.spool, self.tokenizer, self.tell = stage, spool, tokenizer, tell
        self.dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        self.done = 0

    def pack(self, name: str, parts: Parts) -> SplitInfo:
        starts = array("q", [0])
        with _Shards(self.stage, name, self.dtype) as shards:
            for batch in _batches(self.spool.pieces(parts, self.tokenizer.piece)):
                tokens: list[int] = []
                for piece, ids in zip(batch, self.tokenizer.encode_batch([text for text, _ in batch]), strict=True):
                    tokens += ids
                    if piece.ends:
                        tokens.append(self.tokenizer.end)
                        starts.append(shards.tokens + len(tokens))
                shards.write(np.array(tokens, shards.dtype))
                self.done += sum(len(text.encode()) for text, _ in batch)
                self.tell(self.done, self.spool.size)
        sizes = parts.spans[:, 1] - parts.spans[:, 0]
        table = np.zeros((len(sizes) + 1, 3), "<i8")
        table[:, 0] = starts
        table[1:, 1] = sizes.cumsum()
        table[1:, 2] = self._write_names(name, parts)
        np.save(self.stage / f"{name}.documents.npy", table)
        return SplitInfo(documents=len(sizes), tokens=shards.tokens, bytes=int(sizes.sum()))

    def _write_names(self, name: str, parts: Parts) -> list[int]:
        ends = []
        with (self.stage / f"{name}.names.txt").open("wb") as file:
            for one in self.spool.names_of(parts):
                file.write(one + b"\n")
                ends.append(file.tell())
        return ends


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces of about `BATCH` characters together: enough for all cores, and no more in memory."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Shards:
    """Tokens in files of `SHARD_TOKENS` each; the last one has what is left, and nothing makes no file."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.tokens = 0
        self._folder, self._name = folder, name
        self._file: BinaryIO | None = None

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            number, used = divmod(self.tokens, SHARD_TOKENS)
            if not used:
                self.__exit__()
                self._file = (self._folder / f"{self._name}-{number:05d}.bin").open("wb")
            now = tokens[: SHARD_TOKENS - used]
            assert self._file is not None
            self._file.write(now.tobytes())
            self.tokens += len(now)
            tokens = tokens[len(now) :]


def _what_is_there(folder: Path) -> DatasetInfo | None:
    """The prepared data that `folder` holds already; None where it is free.

    Raises:
        ValueError: it holds something else, or only a part of what was prepared.
    """
    if not os.path.lexists(folder):
        return None
    if not folder.is_dir():
        raise ValueError(f"`{folder}` is a file: name a folder for the prepared data")
    names = sorted(os.listdir(folder))
    if not names:
        return None
    if FILE not in names:
        there = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(f"`{folder}` holds something else ({there}): name a new folder for the prepared data")
    info = read_info(folder)
    check_whole(folder, info)
    return info


def _check_same(folder: Path, there: DatasetInfo, options: Options, digest: str) -> None:
    """Raises ValueError where the folder was prepared from other texts or by other options; it says which."""
    asked, had = to_dict(options), to_dict(there.options)
    other = [f"{key} {had[key]}, not {asked[key]}" for key in asked if asked[key] != had[key]]
    if there.texts != digest:
        other.insert(0, f"other texts (from {', '.join(there.sources)})")
    if other:
        raise ValueError(f"`{folder}` is prepared already, with {'; '.join(other)}: name another folder, or remove it")


@contextlib.contextmanager
def _stage(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` for one process to work in; it is gone afterwards, also after an error.

    What a killed process left there is cleared away by the next one.

    Raises:
        ValueError: another process is preparing the same folder.
    """
    folder = Path(os.path.realpath(folder))
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = folder.with_name(f".{folder.name}.partial")
    stage.mkdir(exist_ok=True)
    handle = os.open(stage, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"`{folder}` is being prepared by another process: wait, or name another folder") from None
        try:
            for left in stage.iterdir():
                left.unlink()
            yield stage
        finally:
            # Once it was published, another process may have made a folder of this name.
            if stage.exists() and os.path.samestat(os.fstat(handle), stage.stat()):
                shutil.rmtree(stage)
    finally:
        os.close(handle)
        for parent in made:  # nearest first; one with the result, or with anything else, stays
            with contextlib.suppress(OSError):
                parent.rmdir()


def _publish(stage: Path, folder: Path, info: DatasetInfo) -> None:
    """Makes the work visible under its name, at once and only after all of it is on the disk."""
    text = json.dumps(to_dict(info), indent=2, ensure_ascii=False) + "\n"
    (stage / FILE).write_bytes(text.encode("utf-8", "backslashreplace"))
    for path in (*stage.iterdir(), stage):
        sync(path)
    os.rename(stage, os.path.realpath(folder))
    sync(stage.parent)


def _describe(file: Path) -> FileInfo:
    return FileInfo(bytes=file.stat().st_size, sha256=digest(file))


class _Clock:
    """Times the stages, and passes on how far they are, a few times a second."""

    def __init__(self, report: Report | None) -> None:
        self._report = report
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: Stage) -> Iterator[Tell]:
        began = told = time.perf_counter()

        def tell(done: int, total: int | None) -> None:
            nonlocal told
            now = time.perf_counter()
            if self._report and (now - told > 0.1 or done == total):
                told = now
                self._report(Progress(name, done, total))

        if self._report:  # some stages say nothing for long, and should not begin in silence
            self._report(Progress(name, 0, None))
        yield tell
        self.seconds[name] = time.perf_counter() - began
