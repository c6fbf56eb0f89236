"""Laws of gated linear attention beyond those of every mixer."""

import pytest
import torch

from everlong.mixers.gla import GLA, Options


def test_a_shut_gate_forgets_all_and_an_open_one_nothing():
    torch.manual_seed(0)
    mixer, x = GLA(Options(width=24, num_heads=3)).double(), torch.randn(1, 40, 24, dtype=torch.float64)
    torch.nn.init.zeros_(mixer.decay[1].weight)
    torch.nn.init.constant_(mixer.decay[1].bias, -1e5)
    y, _ = mixer(x)
    torch.testing.assert_close(mixer(x[:, -1:])[0], y[:, -1:], atol=1e-12, rtol=1e-9)
    torch.nn.init.constant_(mixer.decay[1].bias, 1e5)
    _, state = mixer(x)
    k, v = (project(x[0]).view(40, 3, -1) for project in (mixer.k, mixer.v))
    torch.testing.assert_close(state.memory[0], torch.einsum("thk,thv->hkv", k, v), atol=1e-9, rtol=1e-9)


def test_memories_last_longer_with_the_temperature():
    found = []
    for temperature in (1.0, 4.0, 16.0):
        torch.manual_seed(0)
        mixer = GLA(Options(width=24, num_heads=3, gate_temperature=temperature)).double()
        state = mixer.init_state(1)
        state = state._replace(memory=torch.ones_like(state.memory))
        torch.nn.init.zeros_(mixer.v.weight)
        found.append(mixer(torch.randn(1, 1, 24, dtype=torch.float64), state)[1].memory)
    torch.testing.assert_close(found[0], found[1] ** 4, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(found[0], found[2] ** 16, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 0}, "`kernel` must be at least 1, or None"),
        ({"gate_temperature": 0.0}, "`gate_temperature` must be above 0"),
        ({"key_expansion": 0.0}, "got 0 keys"),
        ({"gate_rank": 0}, "gate_rank=0"),
    ],
)
def test_options_that_make_no_layer_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Options(width=24, num_heads=3, **options)
