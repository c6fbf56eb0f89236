"""What the tests of the data share."""

import pytest

from everlong.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def bpe(data) -> Tokenizer:
    """A small byte-level BPE of English and Chinese."""
    names = ("tinyshakespeare.txt", "hongloumeng.txt")
    texts = [(data / "text" / name).read_bytes().decode()[:200_000] for name in names]
    return train_tokenizer(texts, 1500)
