"""Evaluation against a token-by-token computation, and the arithmetic of its measures."""

import math

import numpy as np
import pytest
import torch

from everlong.train.evaluate import evaluate, merge, sample, windows


def naive(model, split, length, stride):
    """Loss and position of every token: the model is called once for each, on exactly the context that it may have."""
    losses, contexts = [], []
    for document in range(len(split)):
        tokens = [int(t) for t in split.document(document)]
        inputs = [tokens[-1], *tokens[:-1]]
        for i, target in enumerate(tokens):
            if i < length:
                start = 0
            else:
                steps = (i - length) // stride + 1
                start = min(length + steps * stride, len(tokens)) - length
            logits = model(torch.tensor([inputs[start : i + 1]])).logits[0, -1]
            losses.append(-logits.double().log_softmax(-1)[target].item())
            contexts.append(i - start)
    return np.array(losses), np.array(contexts)


@pytest.fixture
def short(dataset):
    """The first tokens of three held-out documents, of lengths that are no multiples of anything."""
    from everlong.data.loader import TokenSplit

    split = dataset.split("heldout")
    pieces = [np.append(split.document(i)[:n], dataset.tokenizer.end) for i, n in ((0, 49), (1, 16), (2, 3))]
    names = [f"piece {i}" for i in range(3)]
    size = [len(dataset.tokenizer.decode_bytes(piece.tolist())) for piece in pieces]
    return TokenSplit(np.concatenate(pieces), np.cumsum([0, *map(len, pieces)]), names, np.array(size))


@pytest.mark.parametrize(("length", "stride"), [(16, 8), (16, 16), (16, 1), (13, 5), (64, 32), (1, 1)])
def test_equal_to_one_token_at_a_time(make_model, short, length, stride):
    model = make_model().double().eval()
    losses, contexts = naive(model, short, length, stride)
    found = evaluate(model, short, length=length, stride=stride)
    assert found.tokens == len(losses) == short.num_tokens
    assert found.loss == pytest.approx(losses.mean(), rel=1e-6)
    assert sum(b.tokens for b in found.loss_by_position) == found.tokens
    for bucket in found.loss_by_position:
        inside = (contexts >= bucket.first) & (contexts <= bucket.last)
        assert bucket.tokens == inside.sum()
        assert bucket.loss == pytest.approx(losses[inside].mean(), rel=1e-6)
    assert all(context >= min(length - stride, i) for i, context in enumerate(contexts[: len(short.document(0))]))


def test_it_does_not_depend_on_the_batch_size(make_model, dataset):
    model, split = make_model(), dataset.split("heldout")
    first = evaluate(model, split, length=32, batch_size=1, max_tokens=1500)
    for batch_size in (3, 1000):
        other = evaluate(model, split, length=32, batch_size=batch_size, max_tokens=1500)
        assert other.loss == pytest.approx(first.loss, rel=1e-6)
        assert (other.tokens, other.bytes, other.documents) == (first.tokens, first.bytes, first.documents)


def test_bits_per_byte_perplexity_and_accuracy(make_model, dataset):
    model, split = make_model(), dataset.split("heldout")
    found = evaluate(model, split, length=64)
    size = sum(len(dataset.tokenizer.decode_bytes(split.document(i).tolist())) for i in range(len(split)))
    assert found.bytes == size
    assert found.tokens == split.num_tokens
    assert found.bits_per_byte == pytest.approx(found.loss * found.tokens / math.log(2) / size)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.perplexity == pytest.approx(dataset.tokenizer.vocab_size, rel=0.1)  # it has learnt nothing
    assert 0 <= found.accuracy < 0.1


def test_accuracy_counts_the_most_probable_token(dataset, make_model):
    """A model that always guesses the id one above the last is right as often as that occurs."""
    model, split = make_model(), dataset.split("heldout")
    size = model.config.vocab_size

    def hidden(tokens, state=None, context=None):
        return torch.nn.functional.one_hot((tokens + 1) % size, size).float() * 20, None

    model.hidden, model.logits = hidden, lambda x: x
    found = evaluate(model, split, length=32, stride=16)
    documents = [split.document(i).astype(int) for i in range(len(split))]
    right = sum(((np.append(d[-1], d[:-1]) + 1) % size == d).sum() for d in documents)
    assert right > 0
    assert found.accuracy == pytest.approx(right / split.num_tokens)
    assert found.loss == pytest.approx(math.log(math.exp(20) + size - 1) - 20 * right / split.num_tokens, rel=1e-5)


def test_a_sample_is_fixed_and_within_the_limit(make_model, dataset):
    split = dataset.split("heldout")
    assert sample(split, 500) == sample(split, 500)
    assert sum(tokens for _, tokens in sample(split, 500)) == 500
    assert sum(tokens for _, tokens in sample(split, None)) == split.num_tokens
    assert sum(tokens for _, tokens in sample(split, 10**9)) == split.num_tokens
    found = evaluate(make_model(), split, length=32, max_tokens=500)
    assert found.tokens == 500
    assert 500 < found.bytes < 2000


def test_merged_evaluations_are_one_over_all(make_model, dataset, short):
    model = make_model()
    parts = [evaluate(model, split, length=32) for split in (dataset.split("heldout"), short)]
    both = merge(parts)
    assert both.tokens == sum(part.tokens for part in parts)
    bits = sum(part.bits_per_byte * part.bytes for part in parts)
    assert both.bits_per_byte == pytest.approx(bits / both.bytes)
    assert sum(b.loss * b.tokens for b in both.loss_by_position) == pytest.approx(both.loss * both.tokens)
    same = zip(merge(parts[:1]).loss_by_position, parts[0].loss_by_position, strict=True)
    assert all(a == pytest.approx(b) for a, b in same)


def test_windows_score_every_token_once():
    for length, stride, tokens in [(8, 4, 30), (8, 8, 30), (8, 3, 7), (8, 3, 8), (8, 3, 9), (1, 1, 4), (8, 4, 0)]:
        found = list(windows(length, stride, tokens))
        assert [i for w in found for i in range(w.scored, w.end)] == list(range(tokens))
        assert all(w.end - w.start <= length for w in found)
        assert all(w.scored - w.start >= length - stride for w in found[1:])


def test_the_model_stays_in_its_mode(make_model, dataset):
    model = make_model()
    for mode in (True, False):
        model.train(mode)
        evaluate(model, dataset.split("heldout"), length=32, max_tokens=100)
        assert model.training is mode


def test_bad_numbers_are_refused(make_model, dataset):
    model, split = make_model(), dataset.split("heldout")
    with pytest.raises(ValueError, match="`stride` must be from 1 to `length`: got stride=9, length=8"):
        evaluate(model, split, length=8, stride=9)
    with pytest.raises(ValueError, match="`max_tokens`"):
        evaluate(model, split, length=8, max_tokens=0)
