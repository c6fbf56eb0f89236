"""Any text and any bytes come back; streams never break a character; what is trained is the same every time."""

import hashlib
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from everlong.data.tokenizer import END, StreamDecoder, Tokenizer, byte_tokenizer, cut, train_tokenizer

any_text = st.text(st.characters(exclude_categories=["Cs"]))
# Texts that fall into many parts: spaces of all kinds, contractions, digits, marks, characters of one to four bytes.
spaced_text = st.lists(
    st.sampled_from(
        [
            " ",
            "  ",
            "\n",
            "\r\n",
            "\t",
            "\u3000",
            "\u00a0",
            "\x1c",
            "'s",
            "it'",
            "don",
            "7",
            "é",
            "红楼",
            "𝄞",
            "-",
            "\x85",
        ]
    ),
    max_size=80,
).map("".join)
BYTES = byte_tokenizer()


def stream(tokenizer: Tokenizer, ids) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(i) for i in ids), decoder.finish()]


@given(text=any_text)
@settings(deadline=None)
def test_any_text_comes_back(bpe, text):
    for tokenizer in (bpe, BYTES):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()


@given(content=st.binary() | any_text.map(str.encode).map(lambda content: content[1:-1]))
@settings(deadline=None)
def test_any_bytes_come_back(bpe, content):
    for tokenizer in (bpe, BYTES):
        assert tokenizer.decode_bytes(tokenizer.encode_bytes(content)) == content


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "hongloumeng.txt"])
def test_real_text_comes_back_and_is_shorter_than_its_bytes(data, bpe, name):
    content = (data / "text" / name).read_bytes()
    ids = bpe.encode(content.decode())
    assert bpe.decode_bytes(np.array(ids, np.uint16)) == content
    assert len(ids) < len(content) / 2


@given(content=st.binary(max_size=300))
def test_a_byte_is_its_own_id(content):
    assert BYTES.encode_bytes(content) == list(content)
    assert (BYTES.end, BYTES.vocab_size) == (256, 257)


@given(text=spaced_text, size=st.integers(1, 12))
@settings(deadline=None)
def test_a_text_that_is_cut_has_the_tokens_of_the_whole(bpe, text, size):
    parts = cut(text, size)
    assert "".join(parts) == text
    whole = bpe._backend.encode(text, add_special_tokens=False).ids
    if max(map(len, parts)) < 16 * size:
        assert [i for part in parts for i in bpe._backend.encode(part, add_special_tokens=False).ids] == whole


def test_a_text_without_any_space_is_cut_all_the_same():
    assert list(map(len, cut("x" * 100, 2))) == [32, 32, 32, 4]


def test_a_long_text_has_the_ids_that_the_library_gives(data, bpe):
    for name in ("tinyshakespeare.txt", "hongloumeng.txt"):
        text = (data / "text" / name).read_bytes().decode()
        assert len(cut(text, bpe.piece)) > 10
        assert bpe.encode(text) == bpe._backend.encode(text, add_special_tokens=False).ids


@given(texts=st.lists(spaced_text, max_size=5))
@settings(deadline=None)
def test_a_batch_is_its_texts(bpe, texts):
    assert bpe.encode_batch(texts) == [bpe.encode(text) for text in texts]


def test_a_batch_keeps_long_and_empty_texts_apart(data, bpe):
    long = (data / "text" / "tinyshakespeare.txt").read_text()[:300_000]
    assert bpe.encode_batch(["", long, "", "short", long]) == [
        [],
        bpe.encode(long),
        [],
        bpe.encode("short"),
        bpe.encode(long),
    ]


def test_a_text_that_spells_the_end_token_is_text(bpe):
    for tokenizer in (bpe, BYTES):
        ids = tokenizer.encode(f"a{END}b")
        assert tokenizer.end not in ids
        assert tokenizer.decode([*ids, tokenizer.end]) == f"a{END}b"


@given(text=any_text.filter(lambda text: "\ufffd" not in text), at=st.integers(0, 1000))
@settings(deadline=None)
def test_a_stream_never_breaks_a_character(bpe, text, at):
    for tokenizer in (bpe, BYTES):
        ids = tokenizer.encode(text)
        assert "".join(stream(tokenizer, ids)) == text
        shown = "".join(stream(tokenizer, ids[: at % (len(ids) + 1)]))
        assert text.startswith(shown)


@given(ids=st.lists(st.integers(0, 1000)))
@settings(deadline=None)
def test_a_stream_of_any_ids_is_their_text_without_an_incomplete_end(bpe, ids):
    text = bpe.decode(ids)
    shown = "".join(stream(bpe, ids))
    assert text.startswith(shown)
    assert set(text[len(shown) :]) <= {"\ufffd"}
    assert len(text) - len(shown) <= 1


def unigram(texts) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    specials = ["<unk>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=specials, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend.to_str())


def llama(texts) -> Tokenizer:
    """As SentencePiece's BPE with byte fallback: characters that are not in the vocabulary are spelled in bytes."""
    pieces = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(set("".join(texts)) - {" "}), "▁"]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="</s>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend.to_str())


@pytest.mark.parametrize("make", [unigram, llama])
def test_tokenizers_that_are_not_of_bytes_decode_and_stream(data, make):
    text = (data / "text" / "tinyshakespeare.txt").read_text()[:50_000]
    tokenizer = make([text])
    piece = " ".join(text[:3000].split())
    ids = tokenizer.encode(piece)
    assert not tokenizer.lossless
    assert tokenizer.end == tokenizer._backend.token_to_id("</s>")
    assert tokenizer.decode(ids) == piece
    assert tokenizer.decode_bytes(ids) == piece.encode()
    assert "".join(stream(tokenizer, ids)) == piece


def test_a_stream_of_fallback_bytes_waits_for_the_whole_character():
    tokenizer = llama(["ab"])
    ids = tokenizer.encode("a𝄞é b红b")
    assert len(ids) > len("a𝄞é b红b")
    assert "".join(stream(tokenizer, ids)) == "a𝄞é b红b"
    assert "".join(stream(tokenizer, ids[:3])) == "a"


def test_training_is_the_same_in_every_process(bpe, data):
    program = (
        "import sys; from everlong.data.tokenizer import train_tokenizer\n"
        "texts = [open(path, 'rb').read().decode()[:200_000] for path in sys.argv[1:]]\n"
        "print(train_tokenizer(texts, 1500).fingerprint)"
    )
    paths = [data / "text" / name for name in ("tinyshakespeare.txt", "hongloumeng.txt")]
    for threads in ("1", "3"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        found = subprocess.run(
            [sys.executable, "-c", program, *paths], env=environment, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == bpe.fingerprint


def test_a_vocabulary_ends_where_no_pair_occurs_twice():
    assert 257 < train_tokenizer(["abab abab"], 5000).vocab_size < 270
    assert train_tokenizer(["text"], 257).fingerprint == BYTES.fingerprint


def test_saved_and_loaded_it_is_the_same(bpe, tmp_path):
    bpe.save(tmp_path / "folder")
    content = (tmp_path / "folder" / "tokenizer.json").read_bytes()
    for place in (tmp_path / "folder", str(tmp_path / "folder" / "tokenizer.json")):
        loaded = Tokenizer.load(place)
        assert loaded.fingerprint == bpe.fingerprint == hashlib.sha256(content).hexdigest()
        assert (loaded.end, loaded.vocab_size, loaded.settings) == (bpe.end, bpe.vocab_size, bpe.settings)
    assert bpe.fingerprint != BYTES.fingerprint


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_transformers_loads_it(bpe, tmp_path, kind):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    tokenizer = bpe if kind == "bpe" else BYTES
    tokenizer.save(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.eos_token, loaded.eos_token_id, len(loaded)) == (END, tokenizer.end, tokenizer.vocab_size)
    assert loaded.pad_token_id == tokenizer.end
    for text in ("def f(x):\n    return x", "don't , he said .", "红楼梦\r\n"):
        assert loaded(text)["input_ids"] == tokenizer.encode(text)
        assert loaded.decode(tokenizer.encode(text)) == text
    batch = loaded(["a", "a b c d"], padding=True)
    assert len(set(map(len, batch["input_ids"]))) == 1


def description(change) -> str:
    rules = json.loads(BYTES._description)
    change(rules)
    return json.dumps(rules)


def test_what_a_given_tokenizer_would_add_or_cut_off_is_not_done(tmp_path):
    backend = tokenizers.Tokenizer.from_str(BYTES._description)
    backend.enable_truncation(4)
    backend.enable_padding(length=10)
    backend.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 256)])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode("longer text") == list(b"longer text")


def test_the_end_token_is_the_one_that_the_settings_name(tmp_path):
    (tmp_path / "tokenizer.json").write_text(BYTES._description)
    for value in ("A", {"content": "A", "lstrip": False}):
        settings = {"eos_token": value, "chat_template": "kept", "pad_token": "B"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer.end == ord("A")
        assert tokenizer.settings["chat_template"] == "kept"
        assert tokenizer.settings["pad_token"] == "B"


def test_what_is_no_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no tokenizer at `.*`"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match=r"`.*tokenizer.json` cannot be used: this is no tokenizer.json") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text(description(lambda rules: rules.update(added_tokens=[])))
    with pytest.raises(ValueError, match="no token ends a document"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(BYTES._description)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}')
    with pytest.raises(ValueError, match="'<nowhere>', which is not in the vocabulary"):
        Tokenizer.load(tmp_path)


def test_what_cannot_be_encoded_or_decoded_is_named(bpe):
    with pytest.raises(ValueError, match="`vocab_size` must be at least 257.*: got 256"):
        train_tokenizer(["text"], 256)
    with pytest.raises(ValueError, match="half a surrogate pair"):
        bpe.encode("a\ud83d")
    for wrong in (-1, bpe.vocab_size):
        with pytest.raises(ValueError, match=f"a token id must be below vocab_size={bpe.vocab_size}: got {wrong}"):
            bpe.decode([5, wrong])
    with pytest.raises(ValueError, match="no tokens for single bytes"):
        unigram(["some text"]).encode_bytes(b"a\xff")


def test_nothing_warns(bpe):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bpe.encode("") == []
        assert bpe.decode([]) == ""
