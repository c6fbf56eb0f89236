"""An epoch serves each token once, in an order that depends on nothing but the seed and the epoch."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.config import from_dict, to_dict
from everlong.data.loader import Dataset, Loader, Position, Shards, TokenSplit
from everlong.data.packing import prepare
from everlong.data.tokenizer import byte_tokenizer


def made_of(sizes, shard_tokens=None) -> TokenSplit:
    """Documents of these sizes whose tokens are the numbers of their places, so that each is known again."""
    starts = np.cumsum([0, *sizes])
    tokens = np.arange(starts[-1], dtype=np.uint32)
    if shard_tokens:
        tokens = Shards([tokens[i : i + shard_tokens] for i in range(0, len(tokens), shard_tokens)], shard_tokens)
    return TokenSplit(tokens, starts, [f"document {i}" for i in range(len(sizes))], np.array(sizes))


def rows(loader: Loader, batches: int) -> list[list[int]]:
    """Rows of tokens with their last target."""
    found = []
    for _ in range(batches):
        batch = loader.next()
        assert (batch.tokens[:, 1:] == batch.targets[:, :-1]).all()
        found += torch.cat((batch.tokens, batch.targets[:, -1:]), 1).tolist()
    return found


sizes = st.lists(st.integers(1, 30), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 8)
lengths = st.integers(1, 7)
seeds = st.integers(-5, 5)


@given(sizes=sizes, length=lengths, seed=seeds, epoch=st.integers(0, 3), shard=st.sampled_from([None, 3, 10]))
@settings(deadline=None)
def test_an_epoch_serves_every_token_once_except_the_tail(sizes, length, seed, epoch, shard):
    loader = Loader(made_of(sizes, shard), length=length, batch_size=1, position=Position(seed=seed, epoch=epoch))
    found = rows(loader, loader.windows)
    targets = [token for row in found for token in row[1:]]
    inputs = [token for row in found for token in row[:-1]]
    for served in (targets, inputs):
        assert len(set(served)) == len(served) == loader.windows * length
        assert sum(sizes) - len(served) <= length
    assert loader.position == Position(seed=seed, epoch=epoch + 1)


@given(sizes=sizes, length=lengths, seed=seeds)
@settings(deadline=None)
def test_a_row_follows_its_documents(sizes, length, seed):
    split = made_of(sizes)
    starts, ends = set(split.document_starts[:-1].tolist()), set((split.document_starts[1:] - 1).tolist())
    for row in rows(Loader(split, length=length, batch_size=1, position=Position(seed=seed)), 10):
        for token, following in pairwise(row):
            assert following == token + 1 or (token in ends and following in starts)


@given(sizes=sizes, length=lengths, seed=seeds, batch=st.integers(1, 9), at=st.integers(0, 12))
@settings(deadline=None)
def test_a_saved_position_goes_on_exactly(sizes, length, seed, batch, at):
    split = made_of(sizes)
    loader = Loader(split, length=length, batch_size=batch, position=Position(seed=seed))
    rows(loader, at)
    saved = json.loads(json.dumps(to_dict(loader.position)))
    resumed = Loader(split, length=length, batch_size=batch, position=from_dict(Position, saved))
    assert rows(loader, 5) == rows(resumed, 5)
    assert loader.position == resumed.position


@given(sizes=sizes, length=lengths, seed=seeds, share=st.integers(1, 3), world=st.integers(1, 4))
@settings(deadline=None)
def test_the_global_batch_does_not_depend_on_the_number_of_processes(sizes, length, seed, share, world):
    split, options = made_of(sizes), {"length": length, "batch_size": share * world, "position": Position(seed=seed)}
    alone = Loader(split, **options)
    ranks = [Loader(split, rank=rank, world=world, **options) for rank in range(world)]
    for _ in range(4):
        whole = alone.next()
        parts = [loader.next() for loader in ranks]
        for rank, part in enumerate(parts):
            assert (part.tokens == whole.tokens[rank::world]).all()
            assert (part.targets == whole.targets[rank::world]).all()
            assert part.documents == whole.documents[rank::world]
            assert part.position == whole.position


@given(sizes=sizes, length=lengths, seed=seeds, one=st.integers(1, 15), two=st.integers(1, 15))
@settings(deadline=None)
def test_the_order_does_not_depend_on_the_size_of_batches(sizes, length, seed, one, two):
    # Some of these batches are longer than an epoch.
    split, position = made_of(sizes), Position(seed=seed)
    first = rows(Loader(split, length=length, batch_size=one, position=position), two)
    second = rows(Loader(split, length=length, batch_size=two, position=position), one)
    assert first == second


def test_a_batch_can_be_had_out_of_order():
    loader = Loader(made_of([100] * 5), length=9, batch_size=4)
    positions, batches = [], []
    for _ in range(40):
        positions.append(loader.position)
        batches.append(loader.next().tokens)
    for i in (39, 0, 17, 16):
        assert (loader.batch_at(positions[i]).tokens == batches[i]).all()


def test_seeds_and_epochs_have_orders_of_their_own():
    split = made_of([200])  # also with one document the cuts are elsewhere
    orders = []
    for seed in (0, 1, -1):
        for epoch in (0, 1):
            loader = Loader(split, length=10, batch_size=1, position=Position(seed=seed, epoch=epoch))
            orders.append({row[0] % 10 for row in rows(loader, 5)} | {tuple(map(tuple, rows(loader, 5)))})
    assert all(one != two for i, one in enumerate(orders) for two in orders[:i])


def test_the_order_stays_what_it_is():
    # A run of today has to go on tomorrow, under another version of NumPy too.
    loader = Loader(made_of([3, 20, 1, 9, 12]), length=5, batch_size=2, position=Position(seed=7, epoch=2))
    assert [row[0] for row in rows(loader, 5)] == [7, 2, 23, 28, 17, 42, 22, 12, 37, 11]


@given(sizes=sizes, length=lengths)
@settings(deadline=None)
def test_a_batch_names_the_documents_of_its_rows(sizes, length):
    split = made_of(sizes)
    batch = Loader(split, length=length, batch_size=6).next()
    for row, last, named in zip(batch.tokens, batch.targets[:, -1:], batch.documents, strict=True):
        numbers = split.document_starts.searchsorted(torch.cat((row, last)).numpy(), side="right") - 1
        assert set(named) == {split.names[i] for i in numbers}


def test_batches_are_int64_and_contiguous():
    batch = Loader(made_of([50]), length=8, batch_size=3).next()
    for tensor in (batch.tokens, batch.targets):
        assert tensor.dtype == torch.int64
        assert tensor.shape == (3, 8)
        assert tensor.is_contiguous()


def test_a_split_that_is_too_short_is_refused_with_the_sizes():
    Loader(made_of([5, 4]), length=8, batch_size=1)
    with pytest.raises(ValueError, match="needs 10 tokens.*the split has 9") as caught:
        Loader(made_of([5, 4]), length=9, batch_size=1)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_served_is_refused():
    split = made_of([50])
    with pytest.raises(ValueError, match="`batch_size` must be a multiple of `world`: got batch_size=5, world=2"):
        Loader(split, length=5, batch_size=5, world=2)
    with pytest.raises(ValueError, match="`length` must be at least 1: got 0"):
        Loader(split, length=0, batch_size=1)
    with pytest.raises(ValueError, match="`index` must be from 0 to 9, .*: got 10"):
        Loader(split, length=5, batch_size=1, position=Position(index=10))
    with pytest.raises(ValueError, match="`rank` must be from 0 to 1: got 2"):
        Loader(split, length=5, batch_size=2, rank=2, world=2)


@given(
    lengths=st.integers(1, 40),
    shard=st.integers(1, 9),
    span=st.tuples(st.integers(-45, 45), st.integers(-45, 45)),
)
def test_shards_are_read_like_one_array(lengths, shard, span):
    flat = np.arange(lengths)
    shards = Shards([flat[i : i + shard] for i in range(0, lengths, shard)], shard)
    assert len(shards) == lengths
    assert shards[slice(*span)].tolist() == flat[slice(*span)].tolist()
    assert shards[:].tolist() == flat.tolist()


def test_a_prepared_folder_opens_in_memory_maps(tmp_path):
    tokenizer, texts = byte_tokenizer(), [f"é text {i}\n" * (i + 1) for i in range(20)]
    source = tmp_path / "in"
    source.mkdir()
    for i, text in enumerate(texts):
        (source / f"{i}.txt").write_text(text)
    prepare(source, tmp_path / "out", tokenizer=tokenizer)
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.tokenizer.fingerprint == dataset.info.tokenizer == tokenizer.fingerprint
    train = dataset.split("train")
    assert len(train) == len(train.names) == len(train.bytes) == 18
    for i, name in enumerate(train.names):
        assert train.document(i).tolist() == [*texts[int(name[3:-4])].encode(), 256]
    assert train.names[-1] == train.names[17:][0] == train.names[len(train) - 1]
    assert (train.document(-1) == train.document(17)).all()
    with pytest.raises(IndexError):
        train.document(18)
    assert not train.tokens.flags.writeable
    batch = Loader(train, length=64, batch_size=4).next()
    text = b"".join(text.encode() + b"|" for text in texts)
    for row in batch.tokens.tolist():
        for part in bytes(token if token < 256 else ord("|") for token in row).split(b"|"):
            assert part in text


def test_what_is_no_prepared_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="`.*nowhere` is no prepared data.*everlong prepare"):
        Dataset.open(tmp_path / "nowhere")
    (tmp_path / "x.txt").write_text("text\n" * 100)
    prepare(tmp_path / "x.txt", tmp_path / "out", tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match="unknown split `test`. There is: heldout, train"):
        Dataset.open(tmp_path / "out").split("test")
    file = tmp_path / "out" / "tokenizer.json"
    file.write_text(file.read_text().replace("endoftext", "endOfText"))
    (tmp_path / "out" / "tokenizer_config.json").write_text(
        (tmp_path / "out" / "tokenizer_config.json").read_text().replace("endoftext", "endOfText")
    )
    with pytest.raises(ValueError, match="the tokenizer in `.*` is not the one of its tokens"):
        Dataset.open(tmp_path / "out")
