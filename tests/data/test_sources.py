"""Sources give every text exactly, in a fixed order, and name what they cannot read."""

import bz2
import gzip
import json
import lzma
import sysconfig
import tokenize
from pathlib import Path

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everlong.data import sources
from everlong.data.sources import STDLIB, Document, documents

TEXTS = ["first", "2020-01-01", 'quotes " and \\ and é 𝄞', "two\r\nlines\n", "\u0000 and \u2028", " "]
no_halves = st.text(st.characters(exclude_categories=["Cs"]))


def read(*given, **options) -> dict[str, str]:
    return {document.name: document.text for document in documents(given, **options)}


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "hongloumeng.txt"])
def test_a_text_file_is_one_document_with_its_line_ends(data, name):
    path = data / "text" / name
    assert {key: text.encode() for key, text in read(path).items()} == {name: path.read_bytes()}


def test_a_jsonl_file_has_a_document_in_each_row(data):
    path = data / "prompts" / "gsm8k_train.jsonl"
    expected = pandas.read_json(path, lines=True)["question"].tolist()
    found = read(path, text_field="question")
    assert list(found.values()) == expected
    assert list(found)[:2] == ["gsm8k_train.jsonl:1", "gsm8k_train.jsonl:2"]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".JSONL"])
def test_texts_of_json_rows_are_not_interpreted(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", lines({"other": [1], "text": text} for text in TEXTS))
    assert list(read(path).values()) == TEXTS


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl", '\ufeff{"text": "a"}\r\n\r\n   \n{"text": "b"}')
    assert read(path) == {"rows.jsonl:1": "a", "rows.jsonl:4": "b"}


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary("int32", "string")])
def test_a_parquet_file_has_a_document_in_each_row(tmp_path, kind):
    texts = [*TEXTS, *(f"row {i}" for i in range(3000))]
    table = pyarrow.table({"id": range(len(texts)), "body": pyarrow.array(texts).cast(kind)})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=100)
    assert list(read(tmp_path / "rows.parquet", text_field="body").values()) == texts


def test_a_folder_gives_its_files_by_name_and_tells_what_it_leaves_out(tmp_path):
    for name in ("b.md", "a/z.txt", "a/y.PY", "a/rows.jsonl", ".git/x.txt", "__pycache__/x.py", ".hidden.txt"):
        write(tmp_path / "corpus" / name, '{"text": "row"}' if name.endswith("jsonl") else name)
    for name in ("picture.png", "Makefile", "settings.json"):
        write(tmp_path / "corpus" / name, b"\xff")
    write(tmp_path / "corpus" / "empty.txt", "")
    for name in ("dataset.json", "tokenizer.json", "train.names.txt"):
        write(tmp_path / "corpus" / "prepared" / name, "{}")
    skipped = []
    found = read(tmp_path / "corpus", skip=skipped.append)
    assert list(found) == ["corpus/b.md", "corpus/a/rows.jsonl:1", "corpus/a/y.PY", "corpus/a/z.txt"]
    assert {one.name for one in skipped} == {
        "corpus/picture.png",
        "corpus/Makefile",
        "corpus/settings.json",
        "corpus/empty.txt",
        "corpus/prepared",
    }


def test_sources_follow_each_other_and_those_of_one_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("one/x.txt", "two/x.txt", "y.txt"):
        write(Path(place), place)
    assert read("y.txt", Path("two/x.txt"), "one/x.txt") == {
        "y.txt": "y.txt",
        "two/x.txt": "two/x.txt",
        "one/x.txt": "one/x.txt",
    }


def test_one_source_needs_no_list(tmp_path):
    path = write(tmp_path / "x.txt", "text")
    assert [one.text for one in documents(str(path))] == [one.text for one in documents(path)] == ["text"]


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_files_are_unpacked(tmp_path, suffix):
    text = write(tmp_path / f"x.txt{suffix}", PACK[suffix](b"some\r\ntext \xc3\xa9" * 1000))
    rows = write(tmp_path / f"rows.jsonl{suffix}", PACK[suffix](b'{"text": "a"}\n{"text": "b"}\n'))
    assert list(read(text, rows).values()) == ["some\r\ntext é" * 1000, "a", "b"]


@given(text=no_halves.filter(lambda text: text and "\0" not in text and text[0] != "\ufeff"), block=st.integers(1, 9))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_read_in_blocks_is_the_file(tmp_path, monkeypatch, text, block):
    monkeypatch.setattr(sources, "BLOCK", block)
    assert read(write(tmp_path / "x.txt", text)) == {"x.txt": text}


def test_a_large_file_is_streamed_and_can_be_read_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 1000)
    (document,) = documents(write(tmp_path / "x.txt", "é" * 5000))
    assert max(map(len, document.pieces)) <= 1000
    assert document.text == document.text == "é" * 5000


def test_the_standard_library_without_its_tests():
    found = read(STDLIB)
    root = Path(sysconfig.get_paths()["stdlib"])
    places = [Path(name).relative_to(STDLIB) for name in found]
    assert places == sorted(places, key=Path.as_posix)
    assert len(found) > 400
    assert not {"test", "tests", "idle_test", "site-packages"} & {part for place in places for part in place.parts}
    for name in ("json/decoder.py", "typing.py", "__future__.py"):
        with tokenize.open(root / name) as file:
            assert found[f"{STDLIB}/{name}"].replace("\r\n", "\n") == file.read()


def test_modules_are_decoded_as_they_declare(tmp_path, monkeypatch):
    write(tmp_path / "latin.py", "# coding: latin-1\nx = 'é'\r\n".encode("latin-1"))
    write(tmp_path / "broken.py", b"x = '\xff'\n")
    write(tmp_path / "package/plain.py", "x = 'é'\n")
    write(tmp_path / "package/empty.py", "")
    write(tmp_path / "package/tests/no.py", "no")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    skipped = []
    found = read(STDLIB, skip=skipped.append)
    assert found == {
        f"{STDLIB}/latin.py": "# coding: latin-1\nx = 'é'\r\n",
        f"{STDLIB}/package/plain.py": "x = 'é'\n",
    }
    assert [one.name for one in skipped] == [f"{STDLIB}/broken.py"]


BAD = {
    "missing.txt": (None, "there is no file or folder `.*missing.txt`"),
    "empty.txt": (b"", "`.*empty.txt` has no text in it: the file is empty"),
    "empty.jsonl": (b"\n\n", "`.*empty.jsonl` has no text in it"),
    "latin.txt": (b"abc\xe9def", r"`.*latin.txt` is not UTF-8 text: byte 0xe9 at offset 3 "),
    "cut.txt": (b"abc\xe2\x82", r"`.*cut.txt` is not UTF-8 text: byte 0xe2 at offset 3 "),
    "late.txt": (b"a" * 3_000_000 + b"\xff", "byte 0xff at offset 3000000 "),
    "binary.txt": (b"abc\0def", "`.*binary.txt` is binary, not text: byte 0x00 at offset 3"),
    "late.bin": (b"\xc3\xa9" * 2_000_000 + b"\0", "byte 0x00 at offset 4000000"),
    "wide.txt": ("text".encode("utf-16"), "byte 0xff at offset 0 .*iconv"),
    "field.jsonl": (lines([{"text": "a"}, {"texts": "b"}]), "line 2 of .* no text field `text`. Nearest: `texts`"),
    "null.jsonl": (lines([{"text": "a"}, {"text": None}]), "`text` in line 2 of .* must be a text: got null"),
    "number.jsonl": (lines([{"text": 5}]), "`text` in line 1 of .* must be a text: got a number"),
    "broken.jsonl": (lines([{"text": "a"}]) + "\n{'text'\n", "line 3 of .* is no JSON object"),
    "pretty.json": ('[\n {"text": "a"}\n]', "line 1 of .* is no JSON object: .* makes lines of an array"),
    "array.json": ('[{"text": "a"}]', "line 1 of .* must be a JSON object: got a list. .* makes lines of an array"),
    "half.jsonl": (lines([{"text": "ab\ud83d"}]), "`text` in line 1 of .* half of a surrogate pair, .*at 2"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', "`.*latin.jsonl` is not UTF-8 text: byte 0xff at offset 24 "),
    "no.parquet": (b"PAR1 not really PAR1", "`.*no.parquet` is no whole Parquet file"),
    "cut.txt.gz": (gzip.compress(b"text" * 100)[:-9], "`.*cut.txt.gz` is damaged or cut short"),
    "no.txt.gz": (b"text", "`.*no.txt.gz` is damaged or cut short"),
    "no.txt.xz": (b"text", "`.*no.txt.xz` is damaged or cut short"),
    "no.txt.bz2": (b"text", "`.*no.txt.bz2` is damaged or cut short"),
    "no.txt.zst": (b"text", "`.*no.txt.zst` is damaged or cut short"),
    "pictures/a.png": (b"\xff", "`.*pictures` has no text in it: the folder holds 1 .png"),
    "broken/a.txt": (b"\xff", "`.*a.txt` is not UTF-8 text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_in_one_line(tmp_path, name):
    content, message = BAD[name]
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name.partition("/")[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"texts": ["a"]}, "no text field `text`. Nearest: `texts`. It has: texts"),
        ({"text": [1]}, "`text` in row 1 of .* must be a text: got a number"),
        ({"text": ["a"] * 2000 + [None]}, "`text` in row 2001 of .* must be a text: got null"),
    ],
)
def test_a_parquet_file_without_the_texts_is_named(tmp_path, column, message):
    pyarrow.parquet.write_table(pyarrow.table(column), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "rows.parquet")


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"text {i * i}" for i in range(10000)]}), path)
    content = bytearray(path.read_bytes())
    content[2000:12000] = b"\x55" * 10000
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"`.*rows.parquet` is no whole Parquet file"):
        read(path)


def test_a_misspelled_source_is_answered_with_the_nearest(tmp_path):
    write(tmp_path / "shakespeare.txt", "text")
    with pytest.raises(ValueError, match="Nearest: `.*shakespeare.txt`"):
        read(tmp_path / "shakespear.txt")
    with pytest.raises(ValueError, match=f"Nearest: `{STDLIB}`"):
        read("python-stdlb")


def test_a_source_is_given_once(tmp_path):
    path = write(tmp_path / "x.txt", "text")
    with pytest.raises(ValueError, match=r"`x.txt` is given 2 times"):
        read(path, tmp_path / "." / "x.txt")
    with pytest.raises(ValueError, match="no source is given"):
        read()


def test_a_document_joins_its_pieces():
    assert Document("name", ("a", "b")).text == "ab"
