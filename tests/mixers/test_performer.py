"""What is particular to the Performer: it nears softmax attention, and its rows can be drawn again."""

import pytest
import torch

from everlong.config import from_dict
from everlong.mixers.base import Context
from everlong.mixers.performer import Options, Performer


def make(**options):
    torch.manual_seed(0)
    return Performer(Options(width=16, num_heads=2, **options)).double()


@pytest.mark.parametrize("features", ["positive", "hyperbolic"])
@pytest.mark.parametrize("causal", [True, False])
def test_more_rows_come_nearer_to_softmax_attention(features, causal):
    x = 0.5 * torch.randn(2, 30, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for count in (16, 4096):
        mixer = make(features=features, num_features=count, causal=causal)
        q, k, v = (getattr(mixer, label)(x).unflatten(-1, (2, -1)).transpose(1, 2) for label in "qkv")
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        expected = mixer.o(o.transpose(1, 2).flatten(-2))
        errors.append(((mixer(x)[0] - expected).norm() / expected.norm()).item())
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 4


def test_a_redraw_changes_the_rows_as_its_generator_says():
    one, other = make(), make()
    before = one.rows.clone()
    for mixer in (one, other):
        mixer.redraw(torch.Generator().manual_seed(3))
    assert not torch.equal(one.rows, before)
    assert torch.equal(one.rows, other.rows)


def test_the_rows_are_saved_with_the_weights():
    mixer, other = make(), Performer(Options(width=16, num_heads=2)).double()
    mixer.redraw()
    other.load_state_dict(mixer.state_dict())
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    assert torch.equal(mixer(x)[0], other(x)[0])
    _, state = mixer(x)
    other(x, state)  # the count of draws has come with the rows


def test_a_state_of_another_draw_is_refused():
    mixer, x = make(), torch.randn(2, 3, 16, dtype=torch.float64)
    fresh = mixer.init_state(2)
    _, state = mixer(x)
    mixer.redraw()
    with pytest.raises(ValueError, match="draw 0, and the layer is at draw 1"):
        mixer(x, state)
    assert torch.equal(mixer(x, fresh)[0], mixer(x)[0])  # an empty state has no features in it


def test_one_stale_state_in_a_batch_is_found():
    mixer, x = make(), torch.randn(1, 3, 16, dtype=torch.float64)
    _, stale = mixer(x)
    mixer.redraw()
    _, state = mixer(x)
    together = type(state)(*(torch.cat(pair) for pair in zip(state, stale, strict=True)))
    with pytest.raises(ValueError, match="draw 0"):
        mixer(x.expand(2, -1, -1), together)


def test_nothing_is_redrawn_in_eval():
    mixer = make().eval()
    with pytest.raises(ValueError, match=r"call train\(\)"):
        mixer.redraw()


def test_forward_draws_nothing():
    mixer, x = make(), torch.randn(1, 3, 16, dtype=torch.float64)
    before, random = mixer.rows.clone(), torch.get_rng_state()
    mixer(x, None, Context())
    assert torch.equal(mixer.rows, before)
    assert torch.equal(torch.get_rng_state(), random)


def test_options_are_checked():
    with pytest.raises(ValueError, match="`num_features` must be at least 1"):
        from_dict(Options, {"width": 16, "num_features": 0})
    assert Options(width=128, num_heads=2).rows == 266  # K ln K
    assert Options(width=2, num_heads=2).rows == 1
