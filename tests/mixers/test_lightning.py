"""Laws of lightning attention beyond those of every mixer."""

import pytest
import torch

from everlong.mixers.base import Context
from everlong.mixers.lightning import Lightning, Options


def rates(decay, depth):
    """-ln lambda of each layer and head."""
    layers = [
        Lightning(Options(width=32, num_heads=8, decay=decay), layer=layer, depth=depth).double()
        for layer in range(depth)
    ]
    return torch.stack([-layer.log_decay(layer.init_state(1).memory) for layer in layers])


def test_the_first_head_never_forgets():
    found = rates("paper", 4)
    assert (found[:, 0] == 0).all()
    assert (found[:, 1:] > 0).all()
    torch.testing.assert_close(found[0], torch.arange(8, dtype=torch.float64))


@pytest.mark.parametrize("decay", ["paper", "alibi"])
@pytest.mark.parametrize("depth", [1, 2, 24])
def test_deeper_layers_forget_less(decay, depth):
    found = rates(decay, depth)
    assert torch.isfinite(found).all()
    assert (found.diff(dim=0)[:, 1:] < 0).all()
    assert decay == "paper" or (found > 0).all()


def test_one_layer_has_the_slopes_of_alibi():
    torch.testing.assert_close(rates("alibi", 1)[0], 2.0 ** -torch.arange(1, 9).double(), rtol=2e-5, atol=0)


def test_the_first_layer_turns():
    for rotation, turning in (("first", [True, False, False]), ("all", [True] * 3), ("none", [False] * 3)):
        layers = [
            Lightning(Options(width=16, num_heads=2, rotation=rotation), layer=layer, depth=3) for layer in range(3)
        ]
        assert [layer.theta is not None for layer in layers] == turning
        assert [layer.init_state(1).memory.shape[2] for layer in layers] == [16 if turns else 8 for turns in turning]


def test_only_distances_count():
    torch.manual_seed(0)
    mixer, x = Lightning(Options(width=24, num_heads=3)).double(), torch.randn(2, 9, 24, dtype=torch.float64)
    places = torch.tensor([[0, 1, 2, 5, 6, 7, 20, 21, 22], [3, 4, 9, 10, 11, 12, 13, 14, 90]])
    y, _ = mixer(x, None, Context(positions=places))
    torch.testing.assert_close(mixer(x, None, Context(positions=places + 1234))[0], y, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(mixer(x)[0], y)


def test_bfloat16_weights_know_where_they_are():
    """Positions beyond 256, which bfloat16 cannot count."""
    torch.manual_seed(0)
    mixer, x = Lightning(Options(width=32, num_heads=2)).bfloat16(), torch.randn(1, 50, 32).bfloat16()
    near, far = (mixer(x, None, Context(positions=torch.arange(50)[None] + start))[0] for start in (0, 5_000))
    assert ((far - near).norm() / near.norm()).item() < 3e-2


def test_without_angles_nothing_turns():
    torch.manual_seed(0)
    turning, still = (
        Lightning(Options(width=24, num_heads=3)).double(),
        Lightning(Options(width=24, num_heads=3, rotation="none")).double(),
    )
    still.load_state_dict({name: value for name, value in turning.state_dict().items() if name != "theta"})
    torch.nn.init.zeros_(turning.theta)
    x = torch.randn(2, 30, 24, dtype=torch.float64)
    torch.testing.assert_close(turning(x)[0], still(x)[0], atol=1e-12, rtol=1e-9)
