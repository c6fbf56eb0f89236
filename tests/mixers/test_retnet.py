"""Laws of retention beyond those of every mixer."""

import torch

from everlong.mixers.base import Context
from everlong.mixers.retnet import Options, RetNet


def test_only_distances_count():
    torch.manual_seed(0)
    mixer, x = RetNet(Options(width=24, num_heads=3)).double(), torch.randn(2, 9, 24, dtype=torch.float64)
    places = torch.tensor([[0, 1, 2, 5, 6, 7, 20, 21, 22], [3, 4, 9, 10, 11, 12, 13, 14, 90]])
    y, _ = mixer(x, None, Context(positions=places))
    torch.testing.assert_close(mixer(x, None, Context(positions=places + 1234))[0], y, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(mixer(x)[0], y)
    torch.testing.assert_close(mixer(x, None, Context(positions=torch.arange(9)[None]))[0], mixer(x)[0])


def test_bfloat16_weights_know_where_they_are():
    """Positions beyond 256, which bfloat16 cannot count."""
    torch.manual_seed(0)
    mixer, x = RetNet(Options(width=32, num_heads=2)).bfloat16(), torch.randn(1, 50, 32).bfloat16()
    near, far = (mixer(x, None, Context(positions=torch.arange(50)[None] + start))[0] for start in (0, 5_000))
    assert ((far - near).norm() / near.norm()).item() < 3e-2


def test_the_slowest_head_remembers_thousands_of_tokens():
    mixer = RetNet(Options(width=64, num_heads=8)).double()
    gamma = mixer.log_decay(mixer.init_state(1).memory).exp()
    torch.testing.assert_close(gamma, 1 - 2.0 ** -torch.arange(5, 13, dtype=torch.float64))
