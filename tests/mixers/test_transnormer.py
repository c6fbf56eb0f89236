"""What is particular to TransNormer: the layer's place decides its kind, and blocks are walls."""

import pytest
import torch
from torch.utils import _pytree as pytree

from everlong.config import from_dict
from everlong.mixers.base import Context
from everlong.mixers.transnormer import Options, TransNormer
from everlong.models.lm import LanguageModel, ModelConfig


def make(**options):
    torch.manual_seed(0)
    return TransNormer(from_dict(Options, {"width": 12, "num_heads": 2, **options})).double()


@pytest.mark.parametrize("depth", [1, 2, 5, 6])
def test_the_first_half_looks_nearby(depth):
    kinds = [TransNormer(Options(width=8), layer=layer, depth=depth).config.kind for layer in range(depth)]
    assert kinds == ["diag"] * (depth // 2) + ["norm"] * (depth - depth // 2)
    assert TransNormer(Options(width=8, kind="norm"), layer=0, depth=2).config.kind == "norm"


@pytest.mark.parametrize("variant", ["T1", "T2"])
def test_a_models_cost_is_that_of_its_kinds(variant):
    layers = ({"mixer": "transnormer", "variant": variant, "block_size": 9},)
    model = LanguageModel(ModelConfig(vocab_size=20, width=12, num_layers=3, layers=layers))
    cost = model.cost(4)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    _, state = model(torch.zeros(1, 4, dtype=torch.long))
    assert cost.state_bytes == sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(state))


@pytest.mark.parametrize("variant", ["T1", "T2"])
@pytest.mark.parametrize("causal", [True, False])
def test_nothing_passes_the_wall_of_a_block(variant, causal):
    mixer = make(kind="diag", variant=variant, block_size=5, causal=causal)
    x = torch.randn(1, 17, 12, dtype=torch.float64, requires_grad=True)
    y, _ = mixer(x)
    for token in range(17):
        (gradient,) = torch.autograd.grad(y[0, token].sum(), x, retain_graph=True)
        block = range(token // 5 * 5, min(17, token + 1 if causal else token // 5 * 5 + 5))
        reached = gradient[0].abs().sum(-1).nonzero().flatten().tolist()
        assert set(reached) <= set(block)
        assert variant == "T1" or len(reached) == len(block)  # relu may give a weight of 0


@pytest.mark.parametrize("variant", ["T1", "T2"])
def test_a_full_block_leaves_nothing_behind(variant):
    mixer = make(kind="diag", variant=variant, block_size=5)
    x = torch.randn(2, 10, 12, dtype=torch.float64)
    for pieces in ([10], [5, 5], [3, 4, 3], [1] * 10):
        state = mixer.init_state(2)
        for piece in x.split(pieces, dim=1):
            _, state = mixer(piece, state)
        assert not state.keys.any()
        assert not state.values.any()
        assert state.length.tolist() == [10, 10]


@pytest.mark.parametrize("variant", ["T1", "T2"])
def test_rows_at_different_places_of_a_block_go_on_together(variant):
    mixer = make(kind="diag", variant=variant, block_size=4)
    states = [mixer(torch.randn(1, length, 12, dtype=torch.float64))[1] for length in (0, 1, 3, 4, 6)]
    together = pytree.tree_map(lambda *leaves: torch.cat(leaves), *states)
    for length in (1, 2, 7):
        x = torch.randn(5, length, 12, dtype=torch.float64)
        y, after = mixer(x, together)
        for row, state in enumerate(states):
            expected, own = mixer(x[row : row + 1], state)
            torch.testing.assert_close(y[row : row + 1], expected)
            torch.testing.assert_close(after.keys[row : row + 1], own.keys)


def test_norm_attention_does_not_feel_the_scale_of_its_scores():
    mixer = make(kind="norm")
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    expected, _ = mixer(x)
    mixer.v.weight.data *= 1e3  # far above eps
    mixer(x)
    torch.testing.assert_close(mixer(x)[0], expected, atol=1e-3, rtol=1e-3)


def test_packed_blocks_begin_with_each_sequence():
    mixer = make(kind="diag", block_size=4)
    parts = [torch.randn(1, length, 12, dtype=torch.float64) for length in (3, 6)]
    packed, _ = mixer(torch.cat(parts, 1), None, Context(cu_seqlens=torch.tensor([0, 3, 9])))
    torch.testing.assert_close(packed, torch.cat([mixer(part)[0] for part in parts], 1))


def test_options_are_checked():
    with pytest.raises(ValueError, match="`block_size` must be at least 1"):
        make(block_size=0)
