"""Text to token ids and back: the `tokenizers` library behind the few calls that everlong needs.

A tokenizer that is trained here is a byte-level BPE: text is split by GPT-2's pattern, each part becomes UTF-8 bytes,
and the most frequent pairs are merged. All 256 bytes are tokens, so every text and every string of bytes can be encoded
and comes back unchanged. One special token, `<|endoftext|>`, ends each document.

Sources   Sennrich et al. 2016, arXiv 1508.07909 (BPE); Radford et al. 2019 (byte level and the splitting pattern)
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Integer
from tokenizers import decoders, models, pre_tokenizers, trainers

from everlong.data.disk import write

END = "<|endoftext|>"
BYTES = 256
LARGEST = 1 << 20  # tokens of a vocabulary that is trained: the library takes memory for all of them at once
FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"

# What other tokenizers call the token that ends a document, where their settings do not say it.
KNOWN_ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")

WORD_END = re.compile(r"(?<=\S)[ \t\r\n]")
PIECE = 1 << 16  # characters
LONG_PIECE = 1 << 24  # for tokenizers with other patterns: there a cut may change a token, and only memory asks for it


class Tokenizer:
    """A vocabulary and its rules, as `tokenizer.json` holds them."""

    def __init__(self, description: str, settings: dict[str, Any] | None = None) -> None:
        """Makes a tokenizer of the content of its two files.

        Args:
            description: of `tokenizer.json`; it is kept as it is, so that a saved tokenizer is the same file.
            settings: of `tokenizer_config.json`.

        Raises:
            ValueError: it is no tokenizer, or nothing in it ends a document.
        """
        try:
            self._backend = tokenizers.Tokenizer.from_str(description)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"this is no {FILE} that `tokenizers` can read: {one_line(error)}") from None
        # Texts are encoded whole, and one that spells a special token out is still only text.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._description = description
        self._vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        end = _end_token(settings or {}, self._vocabulary)
        self.end: int = self._vocabulary[end]
        self.vocab_size: int = max(self._vocabulary.values()) + 1
        self.settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",  # prompts of a batch end together, where transformers goes on from
            "pad_token": end,
            **(settings or {}),
            "eos_token": end,
        }

    @classmethod
    def load(cls, place: Path | str) -> "Tokenizer":
        """Reads a folder that has a `tokenizer.json`, or such a file; `tokenizer_config.json` beside it is honoured.

        Raises:
            ValueError: there is none, or it is broken.
        """
        file = Path(place) / FILE if Path(place).is_dir() else Path(place)
        if not file.is_file():
            raise ValueError(f"there is no tokenizer at `{place}`: a {FILE} or a folder that has one is needed")
        beside = file.with_name(SETTINGS)
        settings = _read_settings(beside) if beside.is_file() else None
        try:
            return cls(file.read_text("utf-8"), settings)
        except UnicodeDecodeError as error:
            raise ValueError(f"`{file}` is no tokenizer: it is not UTF-8 text, from offset {error.start} on") from None
        except ValueError as error:
            raise ValueError(f"`{file}` cannot be used: {one_line(error)}") from None

    def save(self, folder: Path | str) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which transformers' AutoTokenizer loads.

        Each file is whole at every instant.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        write(Path(folder) / FILE, self._description.encode())
        text = json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n"
        write(Path(folder) / SETTINGS, text.encode())

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of `tokenizer.json`: where it is equal, ids mean the same."""
        return hashlib.sha256(self._description.encode()).hexdigest()

    @cached_property
    def lossless(self) -> bool:
        """Whether `decode_bytes` gives back exactly what was encoded."""
        rules = json.loads(self._description)
        changed = rules.get("normalizer") or _adds_a_space(rules)
        return not changed and self._token_bytes is not None and self._vocabulary.keys() >= BYTE_OF.keys()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens.

        Raises:
            ValueError: the text holds half a surrogate pair, which is no character.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, computed on all cores, long texts in parts."""
        pieces = [cut(text, self.piece) for text in texts]
        try:
            encoded = self._backend.encode_batch_fast(list(chain.from_iterable(pieces)), add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):  # how the library refuses a str that has no UTF-8
            raise ValueError("a text holds half a surrogate pair, which is no character: encode it as UTF-8") from None
        if len(encoded) == len(texts):
            return [one.ids for one in encoded]
        parts = iter(encoded)
        return [list(chain.from_iterable(one.ids for one in islice(parts, len(some)))) for some in pieces]

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any bytes: what is UTF-8 as text, every other byte as the token of that byte.

        Raises:
            ValueError: some bytes are no UTF-8 and the vocabulary has no tokens for bytes.
        """
        ids: list[int] = []
        while data:
            try:
                return ids + self.encode(data.decode())
            except UnicodeDecodeError as error:
                ids += self.encode(data[: error.start].decode())
                ids += [self._byte_tokens[byte] for byte in data[error.start : error.end]]
                data = data[error.end :]
        return ids

    def decode(self, ids: Iterable[int] | Integer[np.ndarray, " T"]) -> str:
        """The text of ids; special tokens are left out, and bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int] | Integer[np.ndarray, " T"]) -> bytes:
        """The bytes of ids; special tokens are left out.

        Raises:
            ValueError: an id is outside of the vocabulary.
        """
        numbers = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.vocab_size:
            wrong = next(i for i in numbers if not 0 <= i < self.vocab_size)
            raise ValueError(f"a token id must be below vocab_size={self.vocab_size}: got {wrong}")
        if self._token_bytes is None:
            return self._decode_text(numbers).encode()
        return b"".join([self._token_bytes[i] for i in numbers])

    def _decode_text(self, ids: list[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text

    @cached_property
    def piece(self) -> int:
        """The characters from which a text is encoded in parts, see `cut`."""
        rules = json.loads(self._description)
        split = rules.get("pre_tokenizer") or {}
        pattern = (
            split.get("type") == "ByteLevel" and split.get("use_regex", True) and not split.get("add_prefix_space")
        )
        added = [token for token in rules.get("added_tokens", ()) if not token["special"]]
        return PIECE if pattern and not added and not rules.get("normalizer") else LONG_PIECE

    @cached_property
    def _token_bytes(self) -> list[bytes] | None:
        """The bytes of each id, or None where the vocabulary is not made of bytes."""
        rules = json.loads(self._description)
        if (rules.get("decoder") or {}).get("type") != "ByteLevel":
            return None
        table = [b""] * self.vocab_size
        for token, index in self._vocabulary.items():
            table[index] = bytes(map(BYTE_OF.__getitem__, token)) if BYTE_OF.keys() >= set(token) else token.encode()
        for token in rules.get("added_tokens", ()):
            table[token["id"]] = b"" if token["special"] else token["content"].encode()
        return table

    @cached_property
    def _byte_tokens(self) -> list[int]:
        if self._token_bytes is None or not self._vocabulary.keys() >= BYTE_OF.keys():
            raise ValueError("these bytes are no UTF-8, and the tokenizer has no tokens for single bytes")
        return [self._vocabulary[character] for character in sorted(BYTE_OF, key=BYTE_OF.__getitem__)]


class StreamDecoder:
    """Decodes ids one at a time. What it has given is never taken back, and a character is given when it is whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._given = ""

    def push(self, token: int) -> str:
        """The text that this id completes: nothing inside of a character."""
        if self._tokenizer._token_bytes is not None:
            return self._decoder.decode(self._tokenizer.decode_bytes([token]))
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        new = text[len(self._given) :]
        # Such vocabularies write a token by its neighbours, so a few of those before it are kept.
        self._ids = self._ids[-8:] if len(self._ids) > 16 else self._ids
        self._given = self._tokenizer.decode(self._ids)
        return new

    def finish(self) -> str:
        """Ends the stream with what is left of it; a character that was never completed is dropped."""
        left = self._tokenizer.decode(self._ids)[len(self._given) :].rstrip("\ufffd")
        self._decoder.reset()
        self._ids, self._given = [], ""
        return left


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with at most `vocab_size` tokens: fewer where the texts have no more pairs that occur twice.

    The texts are streamed. The same texts in the same order give the same tokenizer.

    Raises:
        ValueError: the vocabulary has no room for the bytes and the end token.
    """
    check_vocab_size(vocab_size)
    if vocab_size == BYTES + 1:
        return byte_tokenizer()
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(BYTE_OF),
        show_progress=False,
    )
    backend.train_from_iterator(iter(texts), trainer)
    return Tokenizer(backend.to_str(pretty=True))


def check_vocab_size(vocab_size: int) -> None:
    """Raises ValueError where a vocabulary has no room for the bytes and the end token, or is beyond all use."""
    if vocab_size <= BYTES:
        raise ValueError(f"`vocab_size` must be at least {BYTES + 1}, all bytes and the end token: got {vocab_size}")
    if vocab_size > LARGEST:
        raise ValueError(f"`vocab_size` must be at most {LARGEST:,}: got {vocab_size:,}. Usual: 4,096 to 131,072")


def byte_tokenizer() -> Tokenizer:
    """The tokenizer without merges: a byte's id is its value, and 256 is the end token."""
    backend = _byte_level(models.BPE(vocab=dict(BYTE_OF), merges=[]))
    backend.add_special_tokens([END])
    return Tokenizer(backend.to_str(pretty=True))


def cut(text: str, size: int) -> list[str]:
    """A text in parts of at least `size` characters, for all cores to work on, cut where a word ends.

    No part of GPT-2's pattern runs from a character that is no space into one that is: the ids of these parts, one
    after the other, are those of the text. Only where 16 times `size` has no space at all is it cut in the middle.
    """
    parts, start = [], 0
    while len(text) - start > size:
        furthest = start + 16 * size
        found = WORD_END.search(text, start + size, furthest)
        end = found.start() if found else furthest
        if end >= len(text):
            break
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]] if parts else [text]


def _read_settings(file: Path) -> dict[str, Any]:
    """What a `tokenizer_config.json` says; ValueError where it is no JSON object."""
    try:
        settings = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"`{file}` is no JSON: {one_line(error)}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"`{file}` must be a JSON object: got a {type(settings).__name__}")
    return settings


def one_line(error: BaseException) -> str:
    """What a library's error says, without line breaks."""
    return " ".join(str(error).split())


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def _printable_bytes() -> Iterator[tuple[str, int]]:
    """GPT-2's names of the bytes: printable ones stand for themselves, the others for characters from 256 on."""
    unprintable = 0
    for byte in range(BYTES):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE:
            yield chr(byte), byte
        else:
            yield chr(BYTES + unprintable), byte
            unprintable += 1


BYTE_OF = dict(_printable_bytes())


def _end_token(settings: dict[str, Any], vocabulary: dict[str, int]) -> str:
    """The token that ends a document: the one that the settings name, or one that is known to."""
    named = settings.get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    if named is not None:
        if not isinstance(named, str) or named not in vocabulary:
            raise ValueError(f"`eos_token` of {SETTINGS} is {named!r}, which is not in the vocabulary")
        return str(named)
    for token in KNOWN_ENDS:
        if token in vocabulary:
            return token
    raise ValueError(f"no token ends a document: name one as `eos_token` in {SETTINGS}. Known: {', '.join(KNOWN_ENDS)}")


def _adds_a_space(rules: dict[str, Any]) -> bool:
    split = rules.get("pre_tokenizer") or {}
    return any(one.get("add_prefix_space", False) for one in (split, *split.get("pretokenizers", ())))
