"""The byte n-gram against a dictionary of counts and a count by hand; `xz` against the program."""

import math
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest

from everlong.models import baselines
from everlong.models.baselines import ByteNGram, xz_bits_per_byte

TEXTS = [b"the cat sat on the mat", b"", b"the dog\x00\xff\n", b"t", b"a rat, a cat; the hat" * 3]
HELD_OUT = [b"the rat sat", b"", b"\xfe\x00 the", b"c"]


def by_dictionary(texts, order):
    """p(byte | text so far), from strings of symbols in one counter; a start symbol is the empty tuple's own `None`."""
    seen, followers, totals = Counter(), Counter(), Counter()
    for text in texts:
        symbols = (None,) * (order - 1) + tuple(text)
        for end in range(order, len(symbols) + 1):
            for begin in range(end - order, end):
                gram = symbols[begin:end]
                followers[gram[:-1]] += gram not in seen
                seen[gram] += 1
                totals[gram[:-1]] += 1

    def p(byte, history):
        if history is None:
            return 1 / 256
        shorter = p(byte, history[1:] if history else None)
        if not totals[history]:
            return shorter
        kinds = followers[history]
        return (seen[*history, byte] + kinds * shorter) / (totals[history] + kinds)

    def probability(byte, before):
        padded = (None,) * (order - 1) + tuple(before)
        return p(byte, padded[len(padded) - order + 1 :])

    return probability


every_order = pytest.mark.parametrize("order", range(1, 8))


@every_order
def test_against_a_dictionary(order):
    model, probability = ByteNGram(order).fit(TEXTS), by_dictionary(TEXTS, order)
    bits = []
    for text in HELD_OUT:
        expected = [math.log2(probability(byte, text[:t])) for t, byte in enumerate(text)]
        np.testing.assert_allclose(model.log2_probabilities(text), expected, rtol=1e-12)
        bits += expected
    assert model.bits_per_byte(HELD_OUT) == pytest.approx(-np.mean(bits), rel=1e-12)


@every_order
@pytest.mark.parametrize("history", [b"", b"t", b"th", b"xyz", b"the cat sa", b"\x00\xff", b"\xff" * 9])
def test_probabilities_sum_to_one_and_are_those_of_the_text(order, history):
    model = ByteNGram(order).fit(TEXTS)
    p = model.probability(history)
    assert p.shape == (256,)
    assert p.min() > 0
    assert p.sum() == pytest.approx(1, abs=1e-12)
    for byte in b"t\x00\xff":
        last = model.log2_probabilities(history + bytes([byte]))[-1]
        assert last == pytest.approx(math.log2(p[byte]), rel=1e-12)


def test_by_hand():
    """After "aab" a bigram has seen: start a, a a, a b; a twice and b once."""
    model = ByteNGram(2).fit([b"aab"])
    unigram_a, unigram_b = (2 + 2 / 256) / 5, (1 + 2 / 256) / 5
    after_a = model.probability(b"xa")
    assert after_a[ord("a")] == pytest.approx((1 + 2 * unigram_a) / 4)
    assert after_a[ord("b")] == pytest.approx((1 + 2 * unigram_b) / 4)
    at_start = model.probability(b"")
    assert at_start[ord("a")] == pytest.approx((1 + unigram_a) / 2)
    never_seen = model.probability(b"b")
    assert never_seen[ord("a")] == pytest.approx(unigram_a)
    assert never_seen[ord("c")] == pytest.approx(2 / 256 / 5)


def test_one_order_is_the_frequency_of_bytes():
    model = ByteNGram(1).fit([b"aaab"])
    assert model.probability(b"anything")[ord("a")] == pytest.approx((3 + 2 / 256) / 6)


@pytest.mark.parametrize("texts", [[], [b""], [b"", b""]])
def test_nothing_learned_is_uniform(texts):
    model = ByteNGram().fit(texts)
    np.testing.assert_array_equal(model.probability(b"abc"), np.full(256, 1 / 256))
    assert model.bits_per_byte([b"abc", b"d"]) == 8


def test_documents_are_apart_and_their_order_does_not_matter():
    model = ByteNGram(3).fit(TEXTS)
    again = ByteNGram(3).fit(text for text in reversed(TEXTS))
    assert model.bits_per_byte(HELD_OUT) == again.bits_per_byte(iter(HELD_OUT))
    joined = ByteNGram(3).fit([b"".join(TEXTS)])
    assert model.bits_per_byte(HELD_OUT) != joined.bits_per_byte(HELD_OUT)


def test_fitting_again_forgets():
    assert ByteNGram(3).fit([b"other"]).fit(TEXTS).bits_per_byte(HELD_OUT) == ByteNGram(3).fit(TEXTS).bits_per_byte(
        HELD_OUT
    )


def test_counting_in_small_batches_changes_nothing(monkeypatch):
    whole = ByteNGram(4).fit(TEXTS).bits_per_byte(HELD_OUT)
    monkeypatch.setattr(baselines, "BATCH", 5)
    assert ByteNGram(4).fit(TEXTS).bits_per_byte(HELD_OUT) == pytest.approx(whole, rel=1e-14)


def test_every_byte_and_only_once_counted():
    text = bytes(range(256)) * 2
    model = ByteNGram(7).fit([text])
    assert model.log2_probabilities(text).shape == (512,)
    assert model.bits_per_byte([text]) < 2


def test_an_empty_document_has_no_bits():
    assert ByteNGram().fit(TEXTS).log2_probabilities(b"").shape == (0,)


@pytest.mark.parametrize("score", [ByteNGram().bits_per_byte, xz_bits_per_byte])
@pytest.mark.parametrize("texts", [[], [b"", b""]])
def test_no_bytes_no_mean(score, texts):
    with pytest.raises(ValueError, match="mean over the bytes of some documents: got none"):
        score(texts)


@pytest.mark.parametrize("order", [0, -1, 8])
def test_orders_that_have_no_key(order):
    with pytest.raises(ValueError, match=f"`order` must lie between 1 and 7: got {order}"):
        ByteNGram(order)


def test_it_learns_real_text(data):
    text = (data / "text" / "tinyshakespeare.txt").read_bytes()
    speeches = text.split(b"\n\n")
    held_out, rest = speeches[::10], [speech for n, speech in enumerate(speeches) if n % 10]
    bits = [ByteNGram(order).fit(rest).bits_per_byte(held_out) for order in (1, 2, 3, 5)]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] < 5
    assert bits[-1] < 2.4


def test_xz_is_the_program(data):
    if shutil.which("xz") is None:
        pytest.skip("needs the program xz: apt-get install xz-utils")
    text = (data / "text" / "tinyshakespeare.txt").read_bytes()[:300_000]
    done = subprocess.run(["xz", "-9", "--threads=1", "--stdout"], input=text, capture_output=True, check=True)
    assert xz_bits_per_byte([text[:1000], b"", text[1000:]]) == 8 * len(done.stdout) / len(text)
