"""What is prepared is the texts, split by document, the same every time, and never there by half."""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from everlong.data import packing, spool
from everlong.data.loader import Dataset
from everlong.data.packing import Progress, prepare, read_info, verify
from everlong.data.spool import held_out_documents
from everlong.data.tokenizer import Tokenizer, byte_tokenizer

SPLITS = ("train", "heldout")
BYTES = byte_tokenizer()


def contents(folder: Path) -> dict[str, str]:
    """The texts of both splits by name, through the tokens; every stated number of bytes is checked on the way."""
    dataset = Dataset.open(folder)
    found = {}
    for name in SPLITS:
        split = dataset.split(name)
        for i in range(len(split)):
            tokens = split.document(i)
            assert tokens[-1] == dataset.tokenizer.end
            text = dataset.tokenizer.decode_bytes(tokens[:-1])
            assert split.bytes[i] == len(text)
            assert split.names[i] not in found
            found[split.names[i]] = text.decode()
    return found


def corpus(folder: Path, texts: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    return folder


@pytest.fixture(scope="session")
def lambada(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "lambada"
    prepare(data / "eval" / "lambada_test.jsonl", folder, vocab_size=700, seed=3)
    return folder


def test_every_document_is_in_one_split_unchanged(data, lambada):
    texts = pandas.read_json(data / "eval" / "lambada_test.jsonl", lines=True)["text"]
    assert contents(lambada) == {f"lambada_test.jsonl:{i}": text for i, text in enumerate(texts, 1)}


def test_the_split_is_the_exact_share_of_documents(lambada):
    info = read_info(lambada)
    assert (info.splits["train"].documents, info.splits["heldout"].documents) == (5153 - 515, 515)
    dataset = Dataset.open(lambada)
    for name in SPLITS:
        split, told = dataset.split(name), info.splits[name]
        assert (len(split), split.num_tokens, split.bytes.sum()) == (told.documents, told.tokens, told.bytes)
        assert len(split.tokens) == split.num_tokens


names = st.lists(st.binary(max_size=8), min_size=2, max_size=40, unique=True)


@given(names=names, share=st.floats(0.01, 0.99), seed=st.integers(-3, 3))
def test_some_documents_are_on_either_side_whatever_the_share(names, share, seed):
    held = held_out_documents(names, share, seed)
    assert held.sum() == min(max(round(share * len(names)), 1), len(names) - 1)
    assert (held == held_out_documents(names, share, seed)).all()
    assert held_out_documents(names, 0.0, seed).sum() == 0
    assert held_out_documents(names, 1.0, seed).all()


@given(names=names, share=st.floats(0.01, 0.99), new=st.binary(min_size=9, max_size=9))
def test_a_new_document_moves_at_most_one_other(names, share, new):
    before = held_out_documents(names, share, 0)
    after = held_out_documents([*names, new], share, 0)
    assert (before != after[:-1]).sum() <= 1
    backwards = held_out_documents(names[::-1], share, 0)[::-1]
    assert (before == backwards).all()


def test_another_seed_is_another_split():
    names = [str(i).encode() for i in range(100)]
    assert (held_out_documents(names, 0.1, 0) != held_out_documents(names, 0.1, 1)).any()


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_of_few_documents_the_ends_are_held_out_from_a_line_on(data, tmp_path, share):
    given = {path.name: path.read_bytes().decode() for path in sorted((data / "text").iterdir())}
    prepare(data / "text", tmp_path / "out", tokenizer=BYTES, held_out=share)
    found = contents(tmp_path / "out")
    assert len(found) == 2 * len(given)
    for name, text in given.items():
        train, heldout = (part for key, part in found.items() if key.startswith(f"text/{name}["))
        assert train + heldout == text
        assert train.endswith("\n")
        assert share <= len(heldout.encode()) / len(text.encode()) < share + 0.01


@given(
    text=st.lists(st.sampled_from(["a", "é", "红", "𝄞", " ", "\n", "\r\n"]), min_size=1, max_size=60).map("".join),
    share=st.floats(0.01, 0.99),
)
def test_a_document_is_cut_between_characters_at_a_line_if_there_is_one(tmp_path_factory, text, share):
    folder = tmp_path_factory.mktemp("spool")
    made = spool.Spool(folder)
    made.fill([spool.Document("name", (text,))], lambda done, total: None)
    train, heldout = spool.split(made, share, 0)
    parts = [piece.text for part in (train, heldout) for piece in made.pieces(part)]
    assert "".join(parts) == text
    size = max(1, round(len(text.encode()) * share))
    assert len(parts) == 2 or len(text.encode()) - size < 4  # the bytes of one character
    near = text.encode()[-2 * size : -size]
    if len(parts) == 2 and b"\n" in near[1:]:
        assert parts[0].endswith("\n")


def test_the_same_texts_give_the_same_bytes(data, tmp_path, monkeypatch):
    source = data / "text" / "tinyshakespeare.txt"
    prepare(source, tmp_path / "one", vocab_size=500)
    # Neither the place nor the size of the batches in which texts are read and encoded may leave a trace.
    monkeypatch.setattr(packing, "BATCH", 10_000)
    monkeypatch.setattr(spool, "BLOCK", 100_000)
    prepare([str(source)], tmp_path / "deeper" / "two", vocab_size=500)
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "deeper/two")
    )
    assert one == two
    assert len(one) == 9


def test_shards_are_one_row_of_tokens(data, lambada, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "SHARD_TOKENS", 50_000)
    prepare(data / "eval" / "lambada_test.jsonl", tmp_path / "out", vocab_size=700, seed=3)
    whole, parts = Dataset.open(lambada).split("train"), Dataset.open(tmp_path / "out").split("train")
    assert len(list((tmp_path / "out").glob("train-*.bin"))) == -(-whole.num_tokens // 50_000) > 2
    assert (parts.tokens[:] == whole.tokens).all()
    assert all((parts.document(i) == whole.document(i)).all() for i in range(0, len(whole), 7))


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path):
    backend = tokenizers.Tokenizer.from_str(BYTES._description)
    backend.add_special_tokens([f"<{i}>" for i in range(70_000)])
    backend.save(str(tmp_path / "tokenizer.json"))
    texts = {f"{i}.txt": f"text {i}\n" for i in range(12)}
    source = corpus(tmp_path / "in", texts)
    info = prepare(source, tmp_path / "out", tokenizer=Tokenizer.load(tmp_path / "tokenizer.json")).info
    assert (info.dtype, info.vocab_size) == ("uint32", 70_257)
    assert contents(tmp_path / "out") == {f"in/{name}": text for name, text in texts.items()}


def test_the_tokenizer_has_not_seen_what_is_held_out(tmp_path):
    names = [f"in/{i}.txt".encode() for i in range(20)]
    held = held_out_documents(names, 0.2, 0)
    words = {True: "zyzzyva", False: "quokka"}
    source = corpus(tmp_path / "in", {f"{i}.txt": f" {words[bool(held[i])]}" * 50 for i in range(20)})
    prepare(source, tmp_path / "out", held_out=0.2, vocab_size=400)
    vocabulary = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
    assert "Ġquokka" in vocabulary
    assert not any("z" in token and len(token) > 1 for token in vocabulary)


def test_a_large_corpus_is_sampled_evenly_for_the_tokenizer(tmp_path):
    made = spool.Spool(tmp_path)
    texts = [f"{i:04d}" * 25 for i in range(1000)]
    made.fill([spool.Document(str(i), (text,)) for i, text in enumerate(texts)], lambda done, total: None)
    everything, _ = spool.split(made, 0.0, 0)
    taken = list(made.sample(everything, 10_000, lambda done, total: None))
    assert taken == texts[::10]
    assert list(made.sample(everything, 10**9, lambda done, total: None)) == texts


def test_a_document_larger_than_memory_is_worked_on_in_pieces(tmp_path, monkeypatch, data, bpe):
    monkeypatch.setattr(spool, "BLOCK", 10_000)
    text = (data / "text" / "hongloumeng.txt").read_bytes().decode()[:100_001]
    made = spool.Spool(tmp_path)
    made.fill([spool.Document("name", (text[:70_000], text[70_000:]))], lambda done, total: None)
    pieces = list(made.pieces(spool.split(made, 0.0, 0)[0], 500))
    assert "".join(piece.text for piece in pieces) == text
    assert max(len(piece.text) for piece in pieces) < 10_000
    assert [piece.ends for piece in pieces] == [*(False,) * (len(pieces) - 1), True]
    assert [i for piece in pieces for i in bpe.encode(piece.text)] == bpe.encode(text)


@pytest.mark.parametrize(("share", "full", "empty"), [(0.0, "train", "heldout"), (1.0, "heldout", "train")])
def test_all_can_be_held_out_or_nothing(tmp_path, share, full, empty):
    source = corpus(tmp_path / "in", {"x.txt": "some\ntext\n"})
    prepare(source, tmp_path / "out", held_out=share, tokenizer=BYTES)
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.split(full).document(0).tolist() == [*b"some\ntext\n", 256]
    assert (len(dataset.split(empty)), dataset.split(empty).num_tokens, len(dataset.split(empty).tokens)) == (0, 0, 0)
    with pytest.raises(ValueError, match="nothing is left to train a tokenizer on"):
        prepare(source, tmp_path / "two", held_out=1.0)


def test_it_tells_how_far_it_is(data, tmp_path):
    told: list[Progress] = []
    source = data / "text" / "tinyshakespeare.txt"
    done = prepare(source, tmp_path / "out", vocab_size=400, report=told.append)
    stages = ["reading", "training the tokenizer", "encoding"]
    assert list(done.seconds) == stages
    assert list(dict.fromkeys(one.stage for one in told)) in (stages, stages[1:])
    encoded = [one.done for one in told if one.stage == "encoding"]
    assert encoded == sorted(encoded)
    assert encoded[-1] == told[-1].total == source.stat().st_size
    assert done.megabytes_per_second > 0


def test_the_same_preparation_is_reused_and_another_refused(tmp_path):
    texts = {f"{i}.txt": f"text {i}\n" for i in range(12)}
    source, out = corpus(tmp_path / "in", texts), tmp_path / "out"
    first = prepare(source, out, vocab_size=300)
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    again = prepare(source, out, vocab_size=300)
    assert (first.reused, again.reused, again.info) == (False, True, first.info)
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before
    for options, message in (
        ({"seed": 1}, "seed 0, not 1"),
        ({"held_out": 0.5}, "held_out 0.1, not 0.5"),
        ({"vocab_size": 400}, "vocab_size 300, not 400"),
        ({"tokenizer": BYTES}, "vocab_size 300, not None; tokenizer None, not "),
    ):
        with pytest.raises(ValueError, match=f"`.*out` is prepared already, with {message}"):
            prepare(source, out, **{"vocab_size": 300, **options})
    (source / "3.txt").write_text("changed")
    with pytest.raises(ValueError, match=r"with other texts \(from .*in\): name another folder, or remove it"):
        prepare(source, out, vocab_size=300)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_the_fingerprint_stands_for_texts_and_options(tmp_path):
    source = corpus(tmp_path / "in", {f"{i}.txt": f"text {i}\n" for i in range(12)})
    made = [
        prepare(source, tmp_path / str(i), **options).info.fingerprint
        for i, options in enumerate(({}, {}, {"seed": 1}, {"held_out": 0.3}, {"tokenizer": BYTES}))
    ]
    assert len(set(made)) == 4
    assert made[0] == made[1]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    source = corpus(tmp_path / "in", {"x.txt": "text"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert not prepare(source, tmp_path / "link", held_out=0.0).reused
    assert prepare(source, tmp_path / "empty", held_out=0.0).reused
    for name in ("in", "in/x.txt"):
        with pytest.raises(ValueError, match=rf"`.*{name}` (holds something else \(x.txt\)|is a file)"):
            prepare(source, tmp_path / name)
    assert (source / "x.txt").read_text() == "text"


def test_options_out_of_range_are_refused_before_anything_is_read(tmp_path):
    for options, message in (
        ({"held_out": 1.5}, "`held_out` must be a share from 0 to 1: got 1.5"),
        ({"held_out": float("nan")}, "`held_out` must be"),
        ({"vocab_size": 100}, "`vocab_size` must be at least 257"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(tmp_path / "nowhere", tmp_path / "out", **options)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_error_leaves_nothing(data, tmp_path, error):
    def stop(progress: Progress) -> None:
        if progress.stage == "encoding":
            raise error("no space left on device")

    with pytest.raises(error):
        prepare(data / "text" / "tinyshakespeare.txt", tmp_path / "out", vocab_size=300, report=stop)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_leaves_nothing(tmp_path):
    source = corpus(tmp_path / "in", {"a.txt": "text", "b.txt": "text"})
    (source / "b.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        prepare(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_killed_preparation_leaves_nothing_that_looks_whole(data, tmp_path):
    source, out = str(data / "text" / "tinyshakespeare.txt"), tmp_path / "out"
    program = (
        "import os, signal, sys\n"
        "from everlong.data import packing\n"
        "packing.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"  # the very end: all files are written
        "packing.prepare(sys.argv[1], sys.argv[2], vocab_size=300)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, source, str(out)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 1
    assert not prepare(source, out, vocab_size=300).reused
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    verify(out)


def test_two_preparations_of_one_folder_do_not_mix(tmp_path):
    source = corpus(tmp_path / "in", {"x.txt": "text"})
    (tmp_path / ".out.partial").mkdir()
    handle = os.open(tmp_path / ".out.partial", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="`.*out` is being prepared by another process"):
        prepare(source, tmp_path / "out")
    os.close(handle)
    prepare(source, tmp_path / "out")


def test_every_file_is_listed_with_its_checksum(lambada):
    info = verify(lambada)
    on_disk = {file.name: file.read_bytes() for file in lambada.iterdir() if file.name != "dataset.json"}
    assert {name: (one.bytes, one.sha256) for name, one in info.files.items()} == {
        name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in on_disk.items()
    }


def test_damage_is_named(tmp_path):
    source, out = corpus(tmp_path / "in", {f"{i}.txt": "text\n" * 100 for i in range(10)}), tmp_path / "out"
    prepare(source, out, tokenizer=BYTES)
    shard = out / "train-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(b"\1" + content[1:])
    Dataset.open(out)
    with pytest.raises(ValueError, match=r"`.*train-00000.bin` was changed"):
        verify(out)
    shard.write_bytes(content[:-2])
    for use in (Dataset.open, verify, lambda folder: prepare(source, folder, tokenizer=BYTES)):
        with pytest.raises(
            ValueError, match=rf"`.*train-00000.bin` has {len(content) - 2} bytes instead of {len(content)}"
        ):
            use(out)
    shard.unlink()
    with pytest.raises(ValueError, match=r"`.*train-00000.bin` is missing"):
        Dataset.open(out)
    (out / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match=r"`.*dataset.json` cannot be used"):
        Dataset.open(out)
    (out / "dataset.json").write_text('{"version": 99}')
    with pytest.raises(ValueError, match="its version is 99, this everlong reads 1"):
        Dataset.open(out)


def test_tokens_are_little_endian_numbers_in_plain_files(tmp_path):
    source = corpus(tmp_path / "in", {f"{i}.txt": "ab" for i in range(10)})
    prepare(source, tmp_path / "out", tokenizer=BYTES)
    tokens = np.frombuffer((tmp_path / "out" / "train-00000.bin").read_bytes(), "<u2")
    assert tokens.tolist() == [97, 98, 256] * 9
    assert (tmp_path / "out" / "heldout-00000.bin").read_bytes() == b"a\0b\0\0\1"
