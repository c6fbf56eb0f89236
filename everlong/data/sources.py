"""Documents from text files, folders, JSONL, Parquet and the standard library of the installed Python.

Everything is streamed: a file of any size is read in blocks, a table row by row. Rows come from `json` and `pyarrow`
themselves, not through `datasets`: its JSON reader infers types (a text "2020-01-01" comes back with a time of day) and
cannot say on which line a row is broken, and its Parquet stream, left half read, can keep the process from ending.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import sysconfig
import tokenize
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from everlong.config import nearest

STDLIB = "python-stdlib"
NO_MODULES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
BLOCK = 1 << 20  # bytes
MARK = "\ufeff"  # the byte order mark that some editors put first; it is no part of the text

_SUFFIXES = """
.txt .text .md .markdown .rst .adoc .org .tex .html .htm
.py .pyi .c .h .cc .cpp .cxx .hh .hpp .cu .java .kt .scala .js .jsx .mjs .ts .tsx .go .rs .rb .php .swift .lua .pl .pm
.r .jl .hs .ml .ex .exs .erl .clj .el .scm .sh .bash .sql .css .cs .fs .asm .s .f90 .zig .nim .dart .cmake .proto
.toml .yaml .yml
"""
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())  # of what is read in a folder; a file that is named itself may have any


@dataclass(frozen=True)
class Document:
    """One text and its name, which is the same wherever the source lies on a disk."""

    name: str
    pieces: Iterable[str]  # in their order; a large file is read as they are asked for

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True)
class Skipped:
    """A file that was left out, and why."""

    name: str
    reason: str


Skip = Callable[[Skipped], None]


def documents(
    sources: str | Path | Sequence[str | Path], *, text_field: str = "text", skip: Skip | None = None
) -> Iterator[Document]:
    """The documents of all sources in a fixed order: sources as given, files by name, rows as they stand.

    A text file is a document, a folder has one in each file, a row of JSONL or Parquet is one. Line ends are kept;
    `.gz`, `.bz2`, `.xz` and `.zst` are unpacked on the way.

    Args:
        sources: paths, or the word `python-stdlib` for the modules of the installed Python without their tests.
        text_field: the field or column that holds the text of a row.
        skip: is told about each file and row that a folder or a table has but that is no text.

    Raises:
        ValueError: a source is missing, empty, given twice, no UTF-8, or has rows without the field.
        OSError: a file cannot be read.
    """
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    if not given:
        raise ValueError(f"no source is given: name text files, folders, JSONL, Parquet, or `{STDLIB}`")
    labels = _labels(given)
    tell = skip or (lambda _: None)
    for source, label in zip(given, labels, strict=True):
        if source == STDLIB:
            found = _standard_library(tell)
        elif os.path.isdir(source):
            found = _folder(Path(source), label, text_field, tell)
        elif os.path.exists(source):
            found = _file(Path(source), label, text_field, tell)
        else:
            raise _missing(source)
        first = next(found, None)
        if first is None:
            raise ValueError(f"`{source}` has no text in it: {_what_was_there(Path(source))}")
        yield first
        yield from found


def _labels(sources: Sequence[str | Path]) -> list[str]:
    """A short name for each source: its last part, or the whole path where two end alike."""
    whole = [str(source) if source == STDLIB else os.path.abspath(source) for source in sources]
    for path, times in Counter(map(os.path.realpath, whole)).items():
        if times > 1:
            raise ValueError(f"a source must be given once: `{os.path.basename(path)}` is given {times} times")
    short = [os.path.basename(path) or path for path in whole]
    often = Counter(short)
    return [name if often[name] == 1 else str(source) for name, source in zip(short, sources, strict=True)]


def _missing(source: str | Path) -> ValueError:
    path = Path(source)
    beside = os.listdir(path.parent) if path.parent.is_dir() else []
    close = nearest(path.name, [*beside, STDLIB])
    hint = f" Nearest: `{close if close == STDLIB else path.parent / close}`." if close else ""
    return ValueError(f"there is no file or folder `{source}`.{hint} A source is a path or the word `{STDLIB}`")


def _what_was_there(source: Path) -> str:
    if str(source) == STDLIB:
        return f"this Python has no modules at {sysconfig.get_paths()['stdlib']}"
    if not source.is_dir():
        return "the file is empty" if not source.stat().st_size else "all of its rows are empty"
    names = [name for _, _, names in os.walk(source) for name in names]
    kinds = Counter(os.path.splitext(name)[1].lower() or "no suffix" for name in names)
    there = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "no files"
    return f"the folder holds {there}. Text files, .jsonl and .parquet are read"


def _folder(folder: Path, label: str, field: str, skip: Skip) -> Iterator[Document]:
    """The files below a folder that are text by their suffix, hidden ones and prepared data left out."""
    for place, folders, names in os.walk(folder):
        inside = Path(place).relative_to(folder)
        if "dataset.json" in names and "tokenizer.json" in names:
            skip(Skipped(str(label / inside), "prepared data"))
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(names):
            if name.startswith("."):
                continue
            path, known = Path(place, name), (label / inside / name).as_posix()
            kind = _kind(path)
            # A .json file in a folder is more often a setting than a table.
            if kind == ".json" or kind not in TEXT_SUFFIXES | TABLES.keys():
                skip(Skipped(known, f"a file with {kind or 'no suffix'} is not read in a folder"))
            elif not path.is_file():
                skip(Skipped(known, "no file"))
            else:
                read = False
                for document in _file(path, known, field, skip):
                    read = True
                    yield document
                if not read:
                    skip(Skipped(known, "empty"))


def _file(path: Path, name: str, field: str, skip: Skip) -> Iterator[Document]:
    """The documents of one file by its kind; none where it is empty."""
    rows = TABLES.get(_kind(path))
    if rows is None:
        text = TextFile(path)
        if next(iter(text), None) is not None:
            yield Document(name, text)
        return
    for number, value in rows(path, field):
        if value:
            yield Document(f"{name}:{number}", (value,))
        else:
            skip(Skipped(f"{name}:{number}", "empty"))


def _kind(path: Path) -> str:
    """The suffix in small letters, without that of a compression."""
    inner = path.with_suffix("") if path.suffix.lower() in UNPACK else path
    return inner.suffix.lower()


def _plain(path: Path) -> BinaryIO:
    return path.open("rb")


def _unpack_zstd(path: Path) -> BinaryIO:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))


UNPACK: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _unpack_zstd,
}


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked; what a decompressor finds wrong is told in our words."""
    try:
        with UNPACK.get(path.suffix.lower(), _plain)(path) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"`{path}` is damaged or cut short: {error}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"`{path}` is damaged or cut short: {error}") from None


@dataclass(frozen=True)
class TextFile:
    """The text of a UTF-8 file in blocks. Each iteration opens it again."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        offset, rest = 0, b""
        with _open(self.path) as stream:
            while True:
                block = stream.read(BLOCK)
                data = rest + block
                text, used = _decode(data, self.path, offset, final=not block)
                text = text if offset else text.removeprefix(MARK)
                if text:
                    yield text
                if not block:
                    return
                offset, rest = offset + used, data[used:]


def _decode(data: bytes, path: Path, offset: int, *, final: bool) -> tuple[str, int]:
    """Text and the number of bytes that it took; a character that is cut off at the end of a block is left to the next.

    Raises:
        ValueError: with the offset of the first byte that cannot be in a text.
    """
    try:
        text, used = codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        wide = not offset and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        cure = "`iconv -f UTF-16 -t UTF-8` converts it" if wide else "Convert it or leave it out"
        where = f"byte 0x{data[error.start]:02x} at offset {offset + error.start}"
        raise ValueError(f"`{path}` is not UTF-8 text: {where} ({error.reason}). {cure}") from None
    if "\0" in text:
        raise ValueError(f"`{path}` is binary, not text: byte 0x00 at offset {offset + data.index(0)}. Leave it out")
    return text, used


def _json_rows(path: Path, field: str) -> Iterator[tuple[int, str]]:
    """Line numbers and texts of a file with one JSON object a line; blank lines are passed over."""
    offset = 0
    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            where = f"line {number} of `{path}`"
            text, _ = _decode(line, path, offset, final=True)
            offset += len(line)
            if not text.strip(MARK + " \t\r\n"):
                continue
            try:
                row = json.loads(text.removeprefix(MARK).rstrip("\r\n"))
            except (ValueError, RecursionError) as error:
                reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                cure = ". `jq -c .[]` makes lines of an array" if text.startswith("[") else ""
                raise ValueError(f"{where} is no JSON object: {reason}{cure}") from None
            if not isinstance(row, dict):
                cure = ". `jq -c .[]` makes lines of an array" if isinstance(row, list) else ""
                raise ValueError(f"{where} must be a JSON object: got {_kind_of(row)}{cure}")
            if field not in row:
                raise _no_field(where, field, row)
            yield number, _text(row[field], f"`{field}` in {where}", b"\\u" in line)


def _parquet_rows(path: Path, field: str) -> Iterator[tuple[int, str]]:
    """Row numbers (from 1) and texts of a Parquet file's column."""
    import pyarrow
    import pyarrow.parquet

    try:
        # Without buffers of its own the reader would hold whole columns of a row group.
        with pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False) as file:
            if field not in file.schema_arrow.names:
                raise _no_field(f"`{path}`", field, file.schema_arrow.names)
            batches = file.iter_batches(batch_size=1024, columns=[field])
            values = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            for number, value in enumerate(values, 1):
                yield number, _text(value, f"`{field}` in row {number} of `{path}`", False)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"`{path}` is no whole Parquet file: {' '.join(str(error).split())}") from None


TABLES: dict[str, Callable[[Path, str], Iterator[tuple[int, str]]]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
}


def _no_field(where: str, field: str, fields: Iterable[str]) -> ValueError:
    names = list(fields)
    close = nearest(field, names)
    hint = f" Nearest: `{close}`." if close else ""
    there = ", ".join(names) or "nothing"
    return ValueError(f"{where} has no text field `{field}`.{hint} It has: {there} (--text-field names the field)")


def _kind_of(value: object) -> str:
    """What a value of a row is, in words."""
    words = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return words.get(type(value), f"a {type(value).__name__}") if value is not None else "null"


def _text(value: object, where: str, may_have_halves: bool) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a text: got {_kind_of(value)}")
    if may_have_halves:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} has half of a surrogate pair, which is no character, at {error.start}") from None
    return value


def _standard_library(skip: Skip) -> Iterator[Document]:
    """The modules of the installed Python in the order of their names, decoded as each of them declares."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for place, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NO_MODULES]
        paths += [Path(place, name) for name in names if name.endswith(".py")]
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        name = f"{STDLIB}/{path.relative_to(root).as_posix()}"
        data = path.read_bytes()
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
            text = data.decode(encoding)
        except (SyntaxError, UnicodeDecodeError) as error:
            skip(Skipped(name, str(error)))
            continue
        if text:
            yield Document(name, (text,))
