"""What a preparation works on: all texts in one file on the disk, and which of them training sees.

Sources are read once. What stays in memory of a document is where its text and its name begin.
"""

import codecs
import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from everlong.data.sources import Document
from everlong.data.tokenizer import PIECE, cut

BLOCK = 1 << 20  # bytes read at a time
FEW_DOCUMENTS = 10  # with fewer the split cuts documents instead of choosing among them
LONG_DOCUMENT = 4096  # bytes from which a document is worth cutting
SEARCH = 1 << 16  # bytes before the wanted place of a cut in which the end of a line is looked for

Tell = Callable[[int, int | None], None]  # bytes done, bytes in all where they are known


@dataclass(frozen=True)
class Parts:
    """What a split has of the spool: whole documents, or a span of some."""

    documents: Int64[np.ndarray, " N"]  # which ones, ascending
    spans: Int64[np.ndarray, "N 2"]  # the first byte in the spool and the one after the last


class Piece(NamedTuple):
    """A stretch of a part's text that can be encoded by itself."""

    text: str
    ends: bool  # whether the part ends with it


class Spool:
    """The texts of all documents, one after the other in a file, and where each begins."""

    def __init__(self, folder: Path) -> None:
        self._texts, self._names = folder / "spool.texts", folder / "spool.names"
        self.text_starts, self._name_starts = array("q", [0]), array("q", [0])
        self.digest = ""  # of all names and texts

    @property
    def size(self) -> int:
        """Bytes of text."""
        return self.text_starts[-1]

    def fill(self, source: Iterable[Document], tell: Tell) -> None:
        """Writes the documents down; the digest of all of them is known afterwards."""
        everything = hashlib.sha256()
        with self._texts.open("wb") as texts, self._names.open("wb") as names:
            for document in source:
                name = document.name.encode("utf-8", "backslashreplace")
                one = hashlib.sha256(name + b"\0")
                for piece in document.pieces:
                    data = piece.encode()
                    one.update(data)
                    texts.write(data)
                    tell(texts.tell(), None)
                names.write(name)
                everything.update(one.digest())
                self.text_starts.append(texts.tell())
                self._name_starts.append(names.tell())
        self.digest = everything.hexdigest()

    def remove(self) -> None:
        self._texts.unlink()
        self._names.unlink()

    def read(self, start: int, stop: int) -> bytes:
        with self._texts.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def names(self) -> Iterator[bytes]:
        with self._names.open("rb") as file:
            for start, stop in pairwise(self._name_starts):
                yield file.read(stop - start)

    def names_of(self, parts: Parts) -> Iterator[bytes]:
        """The names of parts; that of a span says which bytes of its document it has."""
        wanted = zip(parts.documents.tolist(), parts.spans.tolist(), strict=True)
        document, span = next(wanted, (-1, []))
        for i, name in enumerate(self.names()):
            if i == document:
                first, whole = self.text_starts[i], [self.text_starts[i], self.text_starts[i + 1]]
                yield name if span == whole else name + b"[%d:%d]" % (span[0] - first, span[1] - first)
                document, span = next(wanted, (-1, []))

    def pieces(self, parts: Parts, size: int = PIECE) -> Iterator[Piece]:
        """The texts of parts, long ones in pieces of about `size` characters."""
        with self._texts.open("rb") as file:
            for start, stop in parts.spans.tolist():
                file.seek(start)
                texts = _decode(file, stop - start, size)
                text = next(texts)
                for following in texts:
                    yield Piece(text, False)
                    text = following
                yield Piece(text, True)

    def sample(self, parts: Parts, most: int, tell: Tell) -> Iterator[str]:
        """Pieces of about `most` bytes in all, evenly from everything that the parts have."""
        total = int((parts.spans[:, 1] - parts.spans[:, 0]).sum())
        share = min(1.0, most / max(total, 1))
        passed = taken = 0
        for piece in self.pieces(parts):
            size = len(piece.text.encode())
            passed += size
            if taken < passed * share:
                taken += size
                yield piece.text
                tell(passed, total)


def _decode(file: BinaryIO, length: int, size: int) -> Iterator[str]:
    decoder, rest = codecs.getincrementaldecoder("utf-8")(), ""
    while length > BLOCK:
        length -= BLOCK
        *ready, rest = cut(rest + decoder.decode(file.read(BLOCK)), size)
        yield from ready
    yield rest + decoder.decode(file.read(length), final=True)


def split(spool: Spool, share: float, seed: int) -> tuple[Parts, Parts]:
    """What is trained on and what is held out: the documents whose names hash lowest, or the ends of few documents."""
    starts = np.array(spool.text_starts, np.int64)
    spans = np.stack((starts[:-1], starts[1:]), 1)
    documents = np.arange(len(spans))
    if 0.0 < share < 1.0 and len(spans) < FEW_DOCUMENTS:
        return _split_ends(spool, spans, share)
    held = held_out_documents(spool.names(), share, seed)
    return Parts(documents[~held], spans[~held]), Parts(documents[held], spans[held])


def held_out_documents(names: Iterable[bytes], share: float, seed: int) -> Bool[np.ndarray, " N"]:
    """Which documents are held out: exactly the share of them, and at least one on either side unless it is 0 or 1.

    They are those whose names hash lowest, so that most stay where they are when others come and go.
    """
    key = str(seed).encode()
    hashes = (hashlib.blake2b(name, digest_size=8, key=key).digest() for name in names)
    order = np.fromiter((int.from_bytes(value, "big") for value in hashes), np.uint64).argsort(kind="stable")
    count = round(share * len(order))
    if 0.0 < share < 1.0:
        count = min(max(count, 1), len(order) - 1)
    held = np.zeros(len(order), bool)
    held[order[:count]] = True
    return held


def _split_ends(spool: Spool, spans: Int64[np.ndarray, "N 2"], share: float) -> tuple[Parts, Parts]:
    """The documents without their ends, and the ends: of the long ones, or of all where none is long."""
    sizes = spans[:, 1] - spans[:, 0]
    worth = sizes >= LONG_DOCUMENT if sizes.max() >= LONG_DOCUMENT else sizes > 0
    cuts = spans[:, 1].copy()
    for i in worth.nonzero()[0]:
        cuts[i] = _cut_at_line(spool, int(spans[i, 0]), int(spans[i, 1]), share)
    documents, ended = np.arange(len(spans)), cuts < spans[:, 1]
    train = np.stack((spans[:, 0], cuts), 1)
    return Parts(documents, train), Parts(documents[ended], np.stack((cuts, spans[:, 1]), 1)[ended])


def _cut_at_line(spool: Spool, start: int, stop: int, share: float) -> int:
    """Where the end of a document begins that is held out: at a line, else at a word, else at a character.

    The end has from one to two times the share of the bytes; `stop` where the document is too short to be cut.
    """
    size = max(1, round((stop - start) * share))
    wanted = stop - size
    first = max(start + 1, wanted - min(size, SEARCH))
    before = spool.read(first - 1, wanted + 1)
    for end in (b"\n", b" "):
        if (found := before.rfind(end, 0, -1)) >= 0:
            return first + found
    # The last byte of `before` begins the held-out part, unless it is one that goes on with a character.
    while wanted > start and before and before[-1] & 0xC0 == 0x80:
        before, wanted = before[:-1], wanted - 1
    return wanted if wanted > start else stop
