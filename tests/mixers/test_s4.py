"""What S4 and S4D promise beyond the laws of all mixers: kernels, stability, long sequences, the start."""

import pytest
import torch

from everlong import mixers
from everlong.config import from_dict
from everlong.mixers.base import Context
from everlong.mixers.s4d import initial_frequencies
from everlong.nn.hippo import normal_plus_low_rank

FORMS = ("parallel", "chunk", "recurrent")
both = pytest.mark.parametrize(
    ("name", "options"),
    [("s4d", {}), ("s4d", {"discretization": "bilinear", "initialization": "inv"}), ("s4", {})],
    ids=str,
)


def build(name, options, width=5, dtype=torch.float64):
    mixer = mixers.load(name)
    made = mixer(from_dict(mixer.Config, {"width": width, **options})).to(dtype)
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made


@both
@pytest.mark.parametrize("length", [1, 2, 3, 64, 65, 200])
def test_the_kernel_is_the_answer_to_an_impulse(name, options, length):
    system = build(name, options).system()
    impulse = torch.zeros(1, length, 5, dtype=torch.float64)
    impulse[:, 0] = 1.0
    y, _ = system.loop(impulse, torch.zeros(5, 1, system.numbers, dtype=torch.float64), None)
    torch.testing.assert_close(system.kernel(length), y[0].mT, atol=1e-12, rtol=1e-10)


@both
def test_long_and_short_sequences_in_one_row(name, options):
    mixer = build(name, options)
    lengths = [3, 0, 200, 64, 65, 1, 0]
    states = mixer(torch.randn(len(lengths), 9, 5, dtype=torch.float64))[1]
    x = torch.randn(1, sum(lengths), 5, dtype=torch.float64)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    for form in FORMS:
        y, after = mixer(x, states, Context(cu_seqlens=bounds, form=form))
        for n, length in enumerate(lengths):
            here = slice(int(bounds[n]), int(bounds[n + 1]))
            own = type(states)(states.memory[n : n + 1])
            expected, last = mixer(x[:, here], own, Context(form="recurrent"))
            torch.testing.assert_close(y[:, here], expected, atol=1e-12, rtol=1e-10)
            torch.testing.assert_close(after.memory[n : n + 1], last.memory, atol=1e-12, rtol=1e-10)
            assert length or torch.equal(after.memory[n], states.memory[n])


@both
def test_float32_holds_over_thousands_of_tokens(name, options):
    double = build(name, options, width=8)
    x = torch.randn(1, 4096, 8, dtype=torch.float64)
    exact, end = double(x, None, Context(form="chunk"))
    single = double.float()
    for form in FORMS:
        y, state = single(x.float(), None, Context(form=form))
        assert (y - exact).norm() / exact.norm() < 1e-4
        assert (state.memory - end.memory).norm() / end.memory.norm() < 1e-4


@both
def test_no_parameters_make_the_state_grow(name, options):
    for seed in range(5):
        torch.manual_seed(seed)
        mixer = build(name, options)
        for label, parameter in mixer.named_parameters():
            scale = 1.0 if label in {"log_rate", "log_step"} else 10.0
            parameter.data += scale * torch.randn_like(parameter)
        state = mixer(torch.randn(1, 20, 5, dtype=torch.float64))[1].memory
        system = mixer.system()
        state = state.flatten(2).transpose(0, 1)
        before = state.norm()
        for _ in range(12):
            state = system.advance(state, 1 << 6)
        assert state.norm() < before


@both
def test_a_state_may_lie_anywhere(name, options):
    mixer = build(name, options, dtype=torch.float32)
    x, state = torch.randn(1, 70, 5), mixer(torch.randn(1, 3, 5))[1]
    moved = torch.cat([torch.zeros(1), state.memory.detach().flatten()])[1:].view_as(state.memory)
    for form in FORMS:
        expected, own = (mixer(x, type(state)(memory), Context(form=form))[0] for memory in (state.memory, moved))
        assert torch.equal(own, expected)


@both
def test_auto_is_causal_bit_for_bit(name, options):
    mixer = build(name, options, dtype=torch.float32)
    x = torch.randn(2, 300, 5)
    changed = x.clone()
    changed[:, 170:] = 1e4
    assert torch.equal(mixer(x)[0][:, :170], mixer(changed)[0][:, :170])


def test_the_starts_are_those_of_the_paper():
    pairs = 32
    n = torch.arange(pairs, dtype=torch.float64)
    torch.testing.assert_close(initial_frequencies("lin", pairs), torch.pi * n)
    inverse = initial_frequencies("inv", pairs)
    torch.testing.assert_close(inverse, 64 / torch.pi * (64 / (2 * n + 1) - 1))
    legs = initial_frequencies("legs", pairs)
    assert (legs > 0).all()
    # The largest ones approach S4D-Inv's, N^2 / pi / (2 n + 1), as the paper conjectures.
    ratio = legs.flip(0)[:4] / (64**2 / torch.pi / (2 * n[:4] + 1))
    assert ((ratio - 1).abs() < 0.05).all()
    found = normal_plus_low_rank(2 * pairs)
    s4, s4d = build("s4", {}), mixers.load("s4d")(mixers.load("s4d").Config(width=3))
    assert torch.equal(s4d.frequency[0], legs.float())
    assert (s4.frequency[0] - found.eigenvalues.imag[pairs:]).abs().max() < 0.3  # what `build` added


def test_half_a_pair_is_refused():
    for name in ("s4", "s4d"):
        with pytest.raises(ValueError, match="`state_size` must be even.*got 7. Nearest: 6 or 8"):
            from_dict(mixers.load(name).Config, {"width": 4, "state_size": 7})
        with pytest.raises(ValueError, match="`smallest_step` must be positive.*0.2 and 0.1"):
            from_dict(mixers.load(name).Config, {"width": 4, "smallest_step": 0.2})
    with pytest.raises(ValueError, match="initialization"):
        from_dict(mixers.load("s4d").Config, {"width": 4, "initialization": "real"})
