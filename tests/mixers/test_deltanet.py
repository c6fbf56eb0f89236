"""Laws of the delta rule's mixers beyond those of every mixer."""

import pytest
import torch

from everlong.mixers.deltanet import DeltaNet, Options
from everlong.mixers.gated_deltanet import GatedDeltaNet
from everlong.mixers.gated_deltanet import Options as GatedOptions


def remembering(eigenvalues):
    """A layer with beta at its largest and no values, its token, and a memory of something."""
    torch.manual_seed(0)
    mixer = DeltaNet(Options(width=24, num_heads=3, kernel=1, eigenvalues=eigenvalues)).double()
    torch.nn.init.zeros_(mixer.v.weight)
    x = 10 * torch.randn(1, 1, 24, dtype=torch.float64)
    with torch.no_grad():
        mixer.beta.weight.copy_(10 * x[0])
    state = mixer.init_state(1)
    return mixer, x, state._replace(memory=torch.randn_like(state.memory))


def test_a_token_of_both_signs_reflects():
    """Twice the same reflection is none: the memory counts to two, as no positive eigenvalue can."""
    mixer, x, state = remembering("both")
    once, twice = mixer(x, state)[1], mixer(x.repeat(1, 2, 1), state)[1]
    torch.testing.assert_close(twice.memory, state.memory, atol=1e-3, rtol=0)
    assert not torch.allclose(once.memory, state.memory, atol=0.1)


def test_a_token_of_positive_sign_erases():
    mixer, x, state = remembering("positive")
    once, twice = mixer(x, state)[1], mixer(x.repeat(1, 2, 1), state)[1]
    torch.testing.assert_close(twice.memory, once.memory, atol=1e-3, rtol=0)
    assert not torch.allclose(once.memory, state.memory, atol=0.1)


def test_channels_that_fade_alike_are_a_head():
    """Kimi Delta Attention with one rate a head is the memory of Gated DeltaNet."""
    torch.manual_seed(0)
    head, channel = (
        GatedDeltaNet(GatedOptions(width=24, num_heads=3, decay=decay)).double() for decay in ("head", "channel")
    )
    own = channel.state_dict()
    shared = {
        name: value for name, value in head.state_dict().items() if name in own and value.shape == own[name].shape
    }
    channel.load_state_dict(shared, strict=False)
    with torch.no_grad():
        down, up = channel.step[0].weight, torch.randn(3, 8, dtype=torch.float64)
        head.step.weight.copy_(up @ down)
        channel.step[1].weight.copy_(up.repeat_interleave(8, dim=0))
        channel.step_bias.copy_(head.step_bias.repeat_interleave(8))
    x = torch.randn(2, 70, 24, dtype=torch.float64)
    torch.testing.assert_close(head(x)[1].memory, channel(x)[1].memory, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_an_endless_step_forgets_all(decay):
    torch.manual_seed(0)
    mixer = GatedDeltaNet(GatedOptions(width=24, num_heads=3, kernel=1, decay=decay)).double()
    torch.nn.init.constant_(mixer.step_bias, 1e5)
    x = torch.randn(1, 70, 24, dtype=torch.float64, requires_grad=True)
    y, _ = mixer(x)
    torch.testing.assert_close(mixer(x[:, -1:])[0], y[:, -1:], atol=1e-12, rtol=1e-9)
    assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()
