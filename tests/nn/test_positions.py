"""Position encodings: against other people's implementations and closed forms; what they promise of distances,
positions with gaps, caches and blocks; who takes them."""

import math
import os
import re
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

from everlong import LanguageModel, ModelConfig, mixers
from everlong.cli.mixers import describe
from everlong.cli.train import parse_layer, parse_positions
from everlong.config import from_dict, to_dict
from everlong.mixers.base import Context
from everlong.nn import positions
from everlong.nn.positions import attending
from everlong.nn.positions.absolute import sinusoids
from everlong.nn.positions.rotary import RopeOptions

os.environ["HF_HUB_OFFLINE"] = "1"

HEADS, SIZE = 3, 8
WIDTH = HEADS * SIZE

# Every encoding that attention takes, in each of its ways.
SCORES = [
    "none",
    "rope",
    {"position": "rope", "layout": "interleaved", "fraction": 0.5},
    {"position": "rope", "scaling": "yarn", "factor": 4.0, "original_length": 32},
    {"position": "rope", "scaling": "llama3", "factor": 4.0, "original_length": 32},
    {"position": "rope", "scaling": "dynamic", "factor": 2.0, "original_length": 7},
    {"position": "rope", "scaling": "dynamic", "factor": 2.0, "original_length": 7, "step": 5},
    "alibi",
    "t5",
    "rotary_bias",
    {"position": "shaw", "max_distance": 3},
    {"position": "shaw", "max_distance": 3, "values": False},
    "transformer_xl",
    {"position": "deberta", "max_distance": 5},
    {"position": "deberta", "max_distance": 5, "p2c_index": "paper", "terms": ["p2c"]},
    {"position": "deberta", "max_distance": 30, "buckets": 6, "share_projections": True},
]
UNUSED = (lambda x: x, lambda x: x)  # projections that an encoding does not ask for
# Every encoding that meets the embedding, in each of its ways.
EMBEDDED = [
    {"position": "learned", "length": 60},
    {"position": "hierarchical", "length": 8},
    "sinusoidal",
    {"position": "sinusoidal", "layout": "halves", "amplitude": 1.0},
    "recursive",
    {"position": "recursive", "method": "map", "hidden": 3},
    {"position": "recursive", "substeps": 2},
    {"position": "multiplicative", "length": 60},
    "complex",
    {"position": "complex", "frequencies": "word"},
    {"position": "complex", "frequencies": "word and channel"},
    "convolutional",
    {"position": "convolutional", "kernel": 1},
]
scores = pytest.mark.parametrize("position", SCORES, ids=str)
embedded = pytest.mark.parametrize("position", EMBEDDED, ids=str)


def layer(position, **options):
    mixer = mixers.load("attention")
    made = mixer(from_dict(mixer.Config, {"width": WIDTH, "num_heads": HEADS, "position": position, **options}))
    return moved(made.double())


def model(position, **options):
    shape = {"vocab_size": 11, "width": 16, "num_layers": 1, "positions": position, **options}
    return moved(
        LanguageModel(
            from_dict(ModelConfig, {"layers": [{"mixer": "attention", "position": "none"}], **shape})
        ).double()
    )


def moved(module):
    """Away from zeros and ones, where what is wrong could hide."""
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def test_every_encoding_is_tried():
    tried = {positions.parse(position)[0] for position in (*SCORES, *EMBEDDED)}
    assert tried == set(positions.names())


# What relative and absolute mean


@scores
@pytest.mark.parametrize("causal", [True, False])
def test_only_distances_matter_to_attention(position, causal):
    mixer, x, where = layer(position, causal=causal), torch.randn(2, 20, WIDTH).double(), torch.arange(20).expand(2, -1)
    assert mixer.position.relative
    expected = mixer(x)[0]
    torch.testing.assert_close(mixer(x, None, Context(positions=where))[0], expected, atol=1e-10, rtol=1e-10)
    dynamic = "late rotation" in mixer.position.hooks  # which knows the length as well, from the positions
    if not dynamic:
        shifted = mixer(x, None, Context(positions=where + 1000))[0]
        torch.testing.assert_close(shifted, expected, atol=1e-9, rtol=1e-9)
    stretched = mixer(x, None, Context(positions=3 * where))[0]
    assert torch.equal(stretched, expected) == (position == "none")


@embedded
def test_positions_themselves_matter_to_the_embedding(position):
    lm, tokens = model(position), torch.randint(11, (1, 9))
    where = torch.arange(9)[None]
    assert torch.equal(lm(tokens).logits, lm(tokens, None, Context(positions=where)).logits)
    by_place = positions.parse(position)[0] != "convolutional"  # which knows a text's beginning, whatever it is called
    assert torch.equal(lm(tokens, None, Context(positions=where + 40)).logits, lm(tokens).logits) != by_place
    assert not lm.positions.relative


@scores
def test_positions_with_gaps_are_those_of_the_whole(position):
    """Given positions, in pieces, packed and padded, are what they are in one row alone."""
    mixer = layer(position)
    x, where = torch.randn(2, 14, WIDTH).double(), torch.randint(1, 9, (2, 14)).cumsum(1)
    where[1] = where[1] * 300  # far more distances than pairs
    whole = mixer(x, None, Context(positions=where))[0]
    for cut in (1, 6, 13):
        left, state = mixer(x[:, :cut], None, Context(positions=where[:, :cut]))
        right, state = mixer(x[:, cut:], state, Context(positions=where[:, cut:]))
        torch.testing.assert_close(torch.cat([left, right], 1), whole, atol=1e-9, rtol=1e-9)
        real = torch.ones(2, 14, dtype=torch.bool)
        real[0, :cut] = False
        y, padded = mixer(x, None, Context(padding=real, positions=where))
        alone, own = mixer(x[:1, cut:], None, Context(positions=where[:1, cut:]))
        torch.testing.assert_close(y[:1, cut:], alone, atol=1e-9, rtol=1e-9)
        next_x, next_where = torch.randn(2, 3, WIDTH).double(), where[:, -1:] + torch.tensor([2, 3, 7])
        after = mixer(next_x, padded, Context(positions=next_where))[0]
        alone = mixer(next_x[:1], own, Context(positions=next_where[:1]))[0]
        torch.testing.assert_close(after[:1], alone, atol=1e-9, rtol=1e-9)
        real = torch.tensor([[True, True, False], [False, True, True]])
        ragged = mixer(next_x, padded, Context(padding=real, positions=next_where))[0]
        alone = mixer(next_x[:1, :2], own, Context(positions=next_where[:1, :2]))[0]
        torch.testing.assert_close(ragged[:1, :2], alone, atol=1e-9, rtol=1e-9)


@scores
@pytest.mark.parametrize("options", [{}, {"window": 4}, {"causal": False}, {"causal": False, "window": 4}], ids=str)
def test_blocks_of_queries_are_the_whole(position, options, monkeypatch):
    mixer, x = layer(position, **options), torch.randn(2, 23, WIDTH).double()
    where = torch.arange(23).expand(2, -1) * 2
    results = []
    for limit in (attending.LIMIT, 600):
        monkeypatch.setattr(attending, "LIMIT", limit)
        y = mixer(x, None, Context(positions=where))[0]
        found = torch.autograd.grad(y.square().sum(), list(mixer.parameters()), allow_unused=True)
        results.append([y, *(g for g in found if g is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@scores
def test_a_call_without_sequences_or_tokens(position):
    mixer = layer(position)
    y, state = mixer(torch.zeros(0, 5, WIDTH).double())
    assert y.shape == (0, 5, WIDTH)
    y, state = mixer(torch.zeros(1, 0, WIDTH).double(), None, Context(cu_seqlens=torch.tensor([0, 0, 0])))
    assert y.shape == (1, 0, WIDTH)
    assert mixer(torch.randn(2, 3, WIDTH).double(), state)[0].shape == (2, 3, WIDTH)
    empty = torch.zeros(2, 4, dtype=torch.bool)
    assert not mixer(torch.randn(2, 4, WIDTH).double(), None, Context(padding=empty))[0].any()


@scores
def test_weights_in_bfloat16(position):
    mixer, x = layer(position).bfloat16(), torch.randn(2, 40, WIDTH).bfloat16()
    whole, state = mixer(x)
    exact = mixer.double()(x.double())[0]
    assert (whole.double() - exact).norm() < 5e-2 * exact.norm()
    mixer = mixer.bfloat16()
    left, state = mixer(x[:, :30])
    assert left.dtype == mixer(x[:, 30:], state)[0].dtype == torch.bfloat16


# Encodings of the embedding under the model


@embedded
def test_the_model_goes_on_where_it_was(position):
    lm, tokens = model(position), torch.randint(11, (2, 25))
    whole = lm(tokens).logits
    left, state = lm(tokens[:, :4])
    right, state = lm(tokens[:, 4:9], state)
    pieces = [left, right]
    with torch.no_grad():
        for t in range(9, 25):
            logits, state = lm(tokens[:, t : t + 1], state)
            pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-9, rtol=1e-9)
    assert all(leaf.shape[0] == 2 for leaf in pytree.tree_leaves(state))
    empty, same = lm(tokens[:, :0], state)
    assert empty.shape == (2, 0, 11)
    for one, other in zip(pytree.tree_leaves(state), pytree.tree_leaves(same), strict=True):
        torch.testing.assert_close(one, other)


@embedded
def test_padding_and_packing_change_nothing_under_the_model(position):
    lm, rows = model(position), [torch.randint(11, (1, length)) for length in (5, 9, 1, 0)]
    padded, real = torch.zeros(4, 10, dtype=torch.long), torch.zeros(4, 10, dtype=torch.bool)
    for i, row in enumerate(rows):
        padded[i, 10 - row.shape[1] :], real[i, 10 - row.shape[1] :] = row[0], True
    logits, state = lm(padded, None, Context(padding=real))
    packed, _ = lm(torch.cat(rows, 1), None, Context(cu_seqlens=torch.tensor([0, 5, 14, 15, 15])))
    torch.testing.assert_close(packed, torch.cat([lm(row).logits for row in rows], 1), atol=1e-9, rtol=1e-9)
    step = torch.randint(11, (4, 1))
    follow = lm(step, state).logits
    for i, row in enumerate(rows):
        own = lm(row)
        torch.testing.assert_close(logits[i, 10 - row.shape[1] :], own.logits[0], atol=1e-9, rtol=1e-9)
        expected = lm(step[i : i + 1], own.state).logits
        torch.testing.assert_close(follow[i : i + 1], expected, atol=1e-9, rtol=1e-9)


@embedded
def test_what_an_encoding_learns_has_right_gradients(position):
    lm, tokens = model(position), torch.randint(11, (2, 7))
    learned = dict(lm.positions.named_parameters())
    assert lm.cost(5).parameters == sum(p.numel() for p in lm.parameters())
    assert lm.cost(0).state_bytes >= 8
    if not learned:
        return

    def run(*values):
        filled = {f"positions.{name}": value for name, value in zip(learned, values, strict=True)}
        return torch.func.functional_call(lm, filled, (tokens,)).logits

    values = [value.detach().requires_grad_() for value in learned.values()]
    assert torch.autograd.gradcheck(run, values, eps=1e-6, atol=1e-5)
    lm(tokens).logits.square().sum().backward()
    for label, parameter in learned.items():
        assert bool((parameter.grad != 0).any()), label


@embedded
def test_a_model_with_positions_survives_autocast_json_and_files(position, tmp_path):
    from everlong.models.run import load, save

    lm = model(position).float()
    tokens = torch.randint(11, (2, 30))
    exact = lm(tokens).logits
    with torch.autocast("cpu", torch.bfloat16):
        rough = lm(tokens).logits
    assert (rough - exact).norm() < 3e-2 * exact.norm()
    short = model(position).bfloat16()
    _, state = short(tokens[:, :20])
    assert torch.isfinite(short(tokens[:, 20:], state).logits).all()
    assert from_dict(ModelConfig, to_dict(lm.config)) == lm.config
    save(lm, tmp_path)
    torch.testing.assert_close(load(tmp_path)(tokens).logits, exact)


@embedded
def test_transformers_reads_a_model_with_positions(position, tmp_path):
    pytest.importorskip("transformers")
    from everlong.interop.huggingface import EverlongForCausalLM
    from everlong.models.run import save

    lm = model(position).float().eval()
    save(lm, tmp_path)
    theirs = EverlongForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(1, 11, (2, 6))
    torch.testing.assert_close(theirs(tokens).logits, lm(tokens).logits)
    made = theirs.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape == (2, 9)
    with torch.no_grad():
        torch.testing.assert_close(made[:, -1], lm(made[:, :-1]).logits[:, -1].argmax(-1))


def test_learned_positions_are_the_older_name():
    torch.manual_seed(1)
    old = LanguageModel(ModelConfig(vocab_size=5, width=8, num_layers=1, learned_positions=6))
    new = LanguageModel(
        ModelConfig(vocab_size=5, width=8, num_layers=1, positions={"position": "learned", "length": 6})
    )
    new.load_state_dict(old.state_dict())
    assert "positions.weight" in old.state_dict()
    tokens = torch.randint(5, (1, 6))
    assert torch.equal(old(tokens).logits, new(tokens).logits)
    assert old.config.position_limit == new.config.position_limit == 6
    with pytest.raises(ValueError, match="given once"):
        ModelConfig(vocab_size=5, learned_positions=6, positions="sinusoidal")


# Absolute encodings


def test_sinusoids_are_transformers():
    pytest.importorskip("transformers")
    from transformers.models.roformer.modeling_roformer import RoFormerSinusoidalPositionalEmbedding
    from transformers.models.xlm.modeling_xlm import create_sinusoidal_embeddings

    for width in (16, 9):
        for layout, theirs in (
            ("interleaved", create_sinusoidal_embeddings(300, width, torch.empty(300, width))),
            ("halves", RoFormerSinusoidalPositionalEmbedding(300, width).create_weight()),
        ):
            ours = sinusoids(torch.arange(300), width, layout=layout, dtype=torch.float64)
            torch.testing.assert_close(ours.float(), theirs, atol=1e-6, rtol=1e-6)


def test_products_of_sinusoids_depend_on_the_distance():
    waves = sinusoids(torch.arange(50), 12, layout="interleaved", dtype=torch.float64)
    products, frequencies = waves @ waves.T, 10_000 ** (-torch.arange(0, 12, 2).double() / 12)
    distance = (torch.arange(50)[:, None] - torch.arange(50)).double()
    torch.testing.assert_close(products, (distance[..., None] * frequencies).cos().sum(-1))


def test_hierarchical_positions_begin_with_the_learned_ones():
    learned = positions.Learned(1, 6, positions.Learned.Options(length=5))
    longer = positions.Hierarchical(1, 6, positions.Hierarchical.Options(length=5))
    longer.load_state_dict(learned.state_dict())
    vectors = longer.vectors(torch.arange(25))
    torch.testing.assert_close(vectors[:5], learned.weight)
    assert torch.cdist(vectors, vectors).fill_diagonal_(1).min() > 1e-3
    alpha, u = 0.4, (learned.weight - 0.4 * learned.weight[0]) / 0.6
    torch.testing.assert_close(vectors[3 * 5 + 2], alpha * u[3] + (1 - alpha) * u[2])
    with pytest.raises(ValueError, match="has learned 25 positions"):
        longer.vectors(torch.tensor([25]))
    with pytest.raises(ValueError, match="count from 0"):
        longer.vectors(torch.tensor([-1]))


def test_recursive_positions_solve_their_equation():
    """With a linear slope the path is p(t) = exp(A t) p(0)."""
    encoding = positions.Recursive(1, 5, positions.Recursive.Options(interval=0.1)).double()
    slope = torch.randn(5, 5, dtype=torch.float64)
    encoding.slope = lambda time, p: slope @ p
    times = 0.1 * torch.arange(40, dtype=torch.float64)
    expected = torch.linalg.matrix_exp(times[:, None, None] * slope) @ encoding.start
    errors = []
    for substeps in (1, 2):
        object.__setattr__(encoding, "options", positions.Recursive.Options(interval=0.1, substeps=substeps))
        errors.append(((encoding.path(40) - expected).norm() / expected.norm()).item())
    assert errors[0] < 1e-3
    assert 12 < errors[0] / errors[1] < 20  # of fourth order


def test_recursive_positions_know_the_time():
    """dp/dtau = tau has p = tau^2 / 2, which the method solves exactly."""
    encoding = positions.Recursive(1, 3, positions.Recursive.Options(interval=0.5)).double()
    encoding.slope = lambda time, p: torch.full_like(p, time)
    times = 0.5 * torch.arange(30, dtype=torch.float64)
    torch.testing.assert_close(encoding.path(30), encoding.start + times[:, None].square() / 2)


def test_recursive_positions_are_kept_until_parameters_change():
    encoding = positions.Recursive(1, 4)
    calls, slope = [], encoding.slope
    encoding.slope = lambda time, p: calls.append(time) or slope(time, p)
    with torch.no_grad():
        first = encoding.path(10)
        solved = len(calls)
        assert torch.equal(encoding.path(64)[:10], first)
        assert len(calls) == solved  # more than was asked for had been solved
        longer = encoding.path(100)
        assert torch.equal(longer[:10], first)
        assert len(calls) < 2.5 * solved
        encoding.outer.weight.data += 0.1
        changed = encoding.path(10)
    assert not torch.equal(changed, first)
    torch.testing.assert_close(encoding.path(10), changed)


def test_complex_order_turns_complex_numbers():
    encoding = positions.load("complex")(1, 8, vocab_size=None).double()
    x, where = torch.randn(2, 6, 8).double(), torch.randint(90, (2, 6))
    y, _ = encoding.embed(x, where)
    numbers = torch.complex(*x.chunk(2, -1)) * torch.exp(1j * where[..., None] * encoding.frequency[0])
    torch.testing.assert_close(y, torch.cat([numbers.real, numbers.imag], -1))
    with pytest.raises(ValueError, match="need a vocabulary"):
        positions.load("complex")(1, 8, from_dict(positions.load("complex").Options, {"frequencies": "word"}))
    lm = model({"position": "complex", "frequencies": "word"})
    with pytest.raises(ValueError, match="need the tokens"):
        lm.mix(torch.randn(1, 3, 16).double())


def test_zeros_beyond_the_edge_tell_positions_and_a_ring_tells_none():
    constant = torch.ones(1, 12, 4, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 12, 12, 17])
    for padding, inner in (("causal", slice(4, None)), ("zero", slice(2, -2)), ("circular", slice(None))):
        options = from_dict(positions.Convolutional.Options, {"padding": padding})
        encoding = moved(positions.Convolutional(1, 4, options).double())
        y, _ = encoding.embed(constant, torch.arange(12)[None])
        flat = [bool((y[0, t] == y[0, 6]).all()) for t in range(12)]
        assert all(flat[inner])
        assert sum(flat) == len(range(12)[inner])
        x = torch.randn(1, 17, 4).double()
        packed, _ = encoding.embed(x, torch.arange(17)[None], cu_seqlens=cu_seqlens)
        for piece in (slice(0, 12), slice(12, 17)):
            alone, _ = encoding.embed(x[:, piece], torch.arange(17)[None, piece])
            torch.testing.assert_close(packed[:, piece], alone)
        mode = "circular" if padding == "circular" else "constant"
        sides = (4, 0) if padding == "causal" else (2, 2)
        wide = torch.nn.functional.pad(x.mT, sides, mode=mode)
        expected = torch.nn.functional.conv1d(wide, encoding.weight[:, None], encoding.bias, groups=4).mT
        torch.testing.assert_close(encoding.embed(x, torch.arange(17)[None])[0], x + expected)


def test_an_encoding_that_looks_ahead_generates_nothing():
    from everlong import generate
    from everlong.train.beginning import check_trainable
    from everlong.train.settings import TrainConfig

    lm = model({"position": "convolutional", "padding": "zero"})
    with pytest.raises(ValueError, match="sees the tokens to come"):
        generate(lm, torch.zeros(1, 2, dtype=torch.long), max_new_tokens=1)
    with pytest.raises(ValueError, match="take one that is causal"):
        check_trainable(lm.config, TrainConfig())
    limited = model({"position": "hierarchical", "length": 2})
    with pytest.raises(ValueError, match="has learned 4 positions: got a prompt of 3 tokens, and 3 to follow"):
        generate(limited, torch.zeros(1, 3, dtype=torch.long), max_new_tokens=3)


# Rotation


def rope(size=16, heads=2, **options):
    return positions.Rope(heads, size, RopeOptions(**options))


def test_rope_keeps_lengths():
    x = torch.randn(2, 9, 3, 8, dtype=torch.float64)
    y = positions.Rope(3, 8).rotate(x, torch.arange(9)[None])
    torch.testing.assert_close(x.norm(dim=-1), y.norm(dim=-1))


def test_rope_is_llamas():
    pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=32, num_attention_heads=2, head_dim=16)
    x = torch.randn(2, 2, 700, 16)
    where = torch.randint(0, 5000, (2, 700))
    cos, sin = LlamaRotaryEmbedding(config)(x, where)
    theirs, _ = apply_rotary_pos_emb(x, x, cos, sin)
    ours = positions.Rope(2, 16).rotate(x.transpose(1, 2), where).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


def test_rope_interleaved_is_roformers():
    pytest.importorskip("transformers")
    from transformers.models.roformer.modeling_roformer import (
        RoFormerSelfAttention,
        RoFormerSinusoidalPositionalEmbedding,
    )

    x = torch.randn(2, 2, 300, 16)
    waves = RoFormerSinusoidalPositionalEmbedding(300, 16).create_weight()
    theirs, _ = RoFormerSelfAttention.apply_rotary_position_embeddings(waves[None, None], x, x)
    ours = rope(layout="interleaved").rotate(x.transpose(1, 2), torch.arange(300)[None]).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_the_layouts_are_permutations_of_each_other():
    x, where = torch.randn(1, 9, 2, 16).double(), torch.arange(9)[None]
    order = torch.arange(16).view(8, 2).T.flatten()
    paired = rope(layout="interleaved").rotate(x, where)
    torch.testing.assert_close(rope(layout="half").rotate(x[..., order], where), paired[..., order])


def test_part_of_a_head_turns():
    x, where = torch.randn(1, 9, 2, 16).double(), torch.arange(9)[None]
    y = rope(fraction=0.5).rotate(x, where)
    assert torch.equal(y[..., 8:], x[..., 8:])
    torch.testing.assert_close(y[..., :8], rope(size=8).rotate(x[..., :8], where))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.filterwarnings("ignore")
def test_frequencies_are_transformers(kind, factor, fraction):
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    original = {} if kind in {"linear", "dynamic"} else {"original_max_position_embeddings": 512}
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=512 if kind == "dynamic" else 4096,
        rope_parameters={
            "rope_type": kind,
            "rope_theta": 50_000.0,
            "factor": factor,
            "partial_rotary_factor": fraction,
            **original,
            **more,
        },
    )
    ours = rope(size=64, base=50_000.0, fraction=fraction, scaling=kind, factor=factor, original_length=512)
    for length in (100, 512, 513, 3000):
        theirs, attention = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
        torch.testing.assert_close(ours.frequencies(length), theirs, atol=1e-7, rtol=2e-5)
        assert ours.attention_factor == pytest.approx(attention)


def test_ntk_leaves_the_fastest_pair_and_interpolates_the_slowest():
    plain, scaled = rope().frequencies(), rope(scaling="ntk", factor=4.0).frequencies()
    torch.testing.assert_close(scaled[0], plain[0])
    torch.testing.assert_close(scaled[-1], plain[-1] / 4)
    assert rope(size=2, scaling="ntk", factor=4.0).frequencies().tolist() == [1.0]


def test_without_causality_dynamic_turns_by_the_whole_length():
    options = {"position": "rope", "scaling": "dynamic", "factor": 3.0, "original_length": 10}
    mixer, x = layer(options, causal=False), torch.randn(1, 25, WIDTH).double()
    plain = layer({"position": "rope"}, causal=False)
    plain.load_state_dict(mixer.state_dict())
    base = 10_000 * (3.0 * 25 / 10 - 2) ** (SIZE / (SIZE - 2))
    fixed = layer({"position": "rope", "base": base}, causal=False)
    fixed.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x)[0], fixed(x)[0], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(mixer(x[:, :10])[0], plain(x[:, :10])[0], atol=1e-9, rtol=1e-9)


def test_rope_counts_beyond_256_in_bfloat16():
    x = torch.ones(1, 2, 1, 8, dtype=torch.bfloat16)
    y = positions.Rope(1, 8).rotate(x, torch.tensor([[1000, 1001]]))
    assert not torch.equal(y[:, 0], y[:, 1])


# Scores


@pytest.mark.parametrize("length", [1, 7, 130])
@pytest.mark.parametrize("heads", [4, 6, 8])
def test_alibi_is_blooms_and_mpts(length, heads):
    pytest.importorskip("transformers")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    bloom = build_alibi_tensor(torch.ones(1, length), heads, torch.float32).view(heads, length)
    mpt = build_mpt_alibi_tensor(heads, length)[:, 0]
    where = torch.arange(length)
    ours = positions.Alibi(heads, 8).score_bias(where, where)
    seen = torch.ones(length, length).tril().bool()
    for theirs in (bloom, mpt):
        difference = ours - theirs[:, None]  # equal up to a constant a row, which the softmax removes
        row = torch.where(seen, difference, torch.nan)
        assert torch.allclose(row[:, :, :1].expand_as(row)[:, seen], row[:, seen], atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20), (64, 1000)])
def test_buckets_are_t5s(causal, buckets, furthest):
    pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    ahead = torch.arange(-3000, 3001)
    options = from_dict(positions.T5.Options, {"buckets": buckets, "max_distance": furthest})
    ours = positions.T5(2, 4, options, causal=causal).bucket(ahead)
    theirs = T5Attention._relative_position_bucket(
        ahead, bidirectional=not causal, num_buckets=buckets, max_distance=furthest
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("buckets", "furthest"), [(256, 512), (8, 40), (6, 30)])
def test_rows_are_debertas(buckets, furthest):
    pytest.importorskip("transformers")
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    distance = torch.arange(-2000, 2001)
    options = from_dict(positions.Deberta.Options, {"buckets": buckets, "max_distance": furthest})
    ours = positions.Deberta(1, 4, options).row(distance)
    theirs = make_log_bucket_position(distance, buckets, furthest).long() + buckets
    assert torch.equal(ours, theirs.clamp(0, 2 * buckets - 1))
    plain = positions.Deberta(1, 4, from_dict(positions.Deberta.Options, {"max_distance": 5})).row(distance)
    expected = [0 if d <= -5 else 9 if d >= 5 else d + 5 for d in distance.tolist()]  # equation 3
    assert plain.tolist() == expected


def test_position_to_content_is_indexed_by_the_code_or_by_the_paper():
    """k_s meets row d(t, s) in the code and row d(s, t) in the paper, and that is all the difference."""
    q, k = torch.randn(1, 6, 1, 4).double(), torch.randn(1, 6, 1, 4).double()
    distance = (torch.arange(6)[:, None] - torch.arange(6))[None]
    found = {}
    for index in ("code", "paper"):
        options = from_dict(positions.Deberta.Options, {"max_distance": 3, "terms": ["p2c"], "p2c_index": index})
        torch.manual_seed(0)
        encoding = moved(positions.Deberta(1, 4, options).double())
        found[index] = encoding.score(q, k, distance, UNUSED)[0, 0]
    rows = encoding.position_q(encoding.weight)
    for index, sign in (("code", 1), ("paper", -1)):
        for t in range(6):
            for s in range(6):
                expected = k[0, s, 0] @ rows[min(max(sign * (t - s) + 3, 0), 5)] / math.sqrt(2 * 4)
                torch.testing.assert_close(found[index][t, s], expected)
    assert not torch.allclose(found["code"], found["paper"])


@pytest.mark.parametrize("causal", [True, False])
def test_shaw_reads_a_vector_for_each_pair(causal):
    """The definition with a tensor [T, S, K], which the layer itself never makes."""
    mixer, x = layer({"position": "shaw", "max_distance": 3}, causal=causal), torch.randn(1, 9, WIDTH).double()
    q, k, v = (getattr(mixer, label)(x)[0].unflatten(-1, (HEADS, SIZE)) for label in "qkv")
    ahead = torch.arange(9) - torch.arange(9)[:, None]
    row = ahead.clamp(-3, 0 if causal else 3) + 3
    a_key, a_value = mixer.position.keys[row], mixer.position.values[row]
    weights = torch.einsum("thk,tshk->hts", q, k[None] + a_key[:, :, None]) / SIZE**0.5
    if causal:
        weights = weights.masked_fill(ahead > 0, -torch.inf)
    o = torch.einsum("hts,tshk->thk", weights.softmax(-1), v[None] + a_value[:, :, None])
    torch.testing.assert_close(mixer(x)[0], mixer.o(o.flatten(-2))[None])


def test_transformer_xl_takes_the_shorter_way():
    """For one query W_r goes to the query, for many to the distances: both are the definition."""
    encoding = moved(positions.TransformerXL(HEADS, SIZE).double())
    q, k = torch.randn(1, 30, HEADS, SIZE).double(), torch.randn(1, 30, HEADS, SIZE).double()
    distance = (torch.arange(30)[:, None] - torch.arange(30))[None]
    assert encoding._fold(1, 30)
    assert not encoding._fold(200, 230)
    whole = encoding.score(q, k, distance, UNUSED)
    single = [encoding.score(q[:, t : t + 1], k, distance[:, t : t + 1], UNUSED) for t in range(30)]
    torch.testing.assert_close(torch.cat(single, 2), whole)
    row = encoding.r(sinusoids(torch.tensor([-7]), WIDTH, layout="halves", dtype=torch.float64))[0].view(HEADS, SIZE)
    expected = ((q[0, 4] + encoding.v) * row).sum(-1) / SIZE**0.5
    torch.testing.assert_close(whole[0, :, 4, 11], expected)


def test_memory_stays_bounded_while_scores_are_learned(monkeypatch):
    """No tensor that the backward pass keeps is larger than a block's scores, or than the inputs."""
    monkeypatch.setattr(attending, "LIMIT", 3 * 64 * 256)
    mixer, x = layer("transformer_xl"), torch.randn(1, 256, WIDTH).double()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        y = mixer(x)[0]
    assert max(sizes) <= max(x.numel() * 3, 3 * 64 * 256)
    y.sum().backward()


# Who takes what


def test_the_methods_that_an_encoding_lacks_do_nothing():
    nothing = positions.NoPosition(2, 4)
    x = torch.randn(1, 3, 2, 4)
    assert torch.equal(nothing.rotate(x, torch.arange(3)[None]), x)
    assert not nothing.score_bias(torch.arange(3), torch.arange(5)).any()
    assert not nothing.score(x, x, torch.zeros(1, 3, 3, dtype=torch.long), UNUSED).any()
    assert nothing.embed(x[:, :, 0], torch.arange(3)[None])[0] is not None
    assert nothing.limit is None


def test_an_encoding_that_cannot_act_is_refused_with_those_that_can():
    offered = {"num_heads": 2, "size": 8, "offered": frozenset({"rotation"}), "mixer": "linear_attention"}
    with pytest.raises(ValueError, match="has no score bias .* It takes: none, rope"):
        positions.attach("alibi", **offered)
    with pytest.raises(ValueError, match="no late rotation for the position encoding `rope with these options`"):
        positions.attach({"position": "rope", "scaling": "dynamic", "factor": 2.0}, **offered)
    with pytest.raises(ValueError, match="meets the embedding: it is the model's `positions`"):
        positions.attach("sinusoidal", **offered)
    with pytest.raises(ValueError, match="Nearest: `rope`"):
        positions.load("rop")
    with pytest.raises(ValueError, match="must be even, got 7"):
        positions.load("rope")(2, 7)


@pytest.mark.parametrize(
    ("position", "message"),
    [
        ({"position": "rope", "facter": 2.0}, "unknown option of Rope `facter`. Nearest: `factor`"),
        ({"position": "rope", "factor": 2.0}, "`factor` needs a `scaling`"),
        ({"position": "rope", "scaling": "yarn", "factor": 0.5}, "`factor` must be at least 1"),
        ({"position": "rope", "scaling": "yarm"}, "scaling"),
        ({"position": "rope", "fraction": 0.4}, "must be even, got 3"),
        ({"scaling": "yarn"}, "has one under the key `position`"),
        ({"position": "alibi", "slope": 2}, "unknown option of No"),
        ({"position": "t5", "buckets": 7}, "`buckets` must be even"),
        ({"position": "shaw", "max_distance": 0}, "`max_distance` must be at least 1"),
        ({"position": "deberta", "buckets": 2000}, "less than twice `max_distance`"),
        ({"position": "deberta", "terms": []}, "`terms` must be c2p, p2c or both"),
        ("learned", "`attention` has no embedding"),
        ("xl", "unknown position encoding `xl`"),
        (7, "`position` of attention must be a text or a mapping"),
    ],
    ids=str,
)
def test_a_config_says_at_once_what_cannot_work(position, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        from_dict(mixers.load("attention").Config, {"width": WIDTH, "num_heads": HEADS, "position": position})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("position", "message"),
    [
        ("rope", "`embedding` has no rotation for the position encoding `rope`. It takes: complex"),
        ("learnt", "Nearest: `learned`"),
        ({"position": "learned", "length": 0}, "`length` must be at least 1"),
        ({"position": "hierarchical", "alpha": 0.5}, "`alpha` must"),
        ({"position": "convolutional", "padding": "zero", "kernel": 4}, "`kernel` must be odd"),
        ({"position": "recursive", "interval": 0}, "`interval` must be above 0"),
    ],
    ids=str,
)
def test_a_model_says_at_once_what_cannot_work(position, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        from_dict(ModelConfig, {"vocab_size": 9, "width": 16, "positions": position})
    assert "\n" not in str(error.value)


def test_words_of_the_command_line():
    assert parse_layer("attention:position=rope") == {"mixer": "attention", "position": "rope"}
    given = "attention:position=rope:window=4:position.scaling=yarn:position.original-length=64"
    inner = {"position": "rope", "scaling": "yarn", "original_length": 64}
    assert parse_layer(given) == {"mixer": "attention", "position": inner, "window": 4}
    with pytest.raises(ValueError, match="add position=NAME"):
        parse_layer("attention:position.scaling=yarn")
    with pytest.raises(ValueError, match="given twice"):
        parse_layer("attention:position=rope:position.base=1:position.base=2")
    assert parse_positions("sinusoidal") == "sinusoidal"
    assert parse_positions("learned:length=512") == {"position": "learned", "length": 512}
    with pytest.raises(ValueError, match="key=value"):
        parse_positions("learned:512")


@pytest.mark.parametrize("name", mixers.names())
def test_a_mixer_takes_what_it_says(name):
    mixer, told = mixers.load(name), describe(name)["position_encodings"]
    assert bool(told) == bool(mixer.traits.positions)
    if "position" not in mixer.Config.__dataclass_fields__:
        return
    heads = {"num_heads": 2} if "num_heads" in mixer.Config.__dataclass_fields__ else {}
    for position in positions.names():
        try:
            mixer(from_dict(mixer.Config, {"width": 32, **heads, "position": position}))
        except ValueError:
            assert position not in told
        else:
            assert position in told


def test_the_manual_has_every_encoding():
    page = (Path(__file__).parents[2] / "docs" / "positions.md").read_text(encoding="utf-8")
    assert f"<!-- encodings -->\n{positions.markdown()}<!-- end -->" in page
    for hook in positions.HOOKS:
        assert f"| {hook} |" in page
