"""The laws of the contract, for every mixer that `mixers.names()` finds and a few of its options."""

import dataclasses

import pytest
import torch
from torch.utils import _pytree as pytree

from everlong import mixers
from everlong.config import from_dict, to_dict
from everlong.mixers.base import Context, name_of

WIDTH = 36  # an odd number of heads of an odd half size

# Options beyond the defaults under which the laws must hold as well.
OPTIONS = {
    "attention": [
        {"num_heads": 6, "num_kv_heads": 2, "qk_norm": True, "bias": True},
        {"num_heads": 2, "window": 5},
        {"num_heads": 3, "position": "alibi"},
        {"num_heads": 3, "position": "none", "window": 1},
    ],
    "linear_attention": [{"num_heads": 2, "position": "rope"}, {"num_heads": 3, "feature_map": "identity"}],
    "gated_deltanet": [
        {"num_heads": 4, "num_key_heads": 2, "key_size": 5, "value_expansion": 2.0, "eigenvalues": "both"},
        {"num_heads": 3, "kernel": 1},
    ],
    "mamba2": [{"num_heads": 4, "num_groups": 2, "state_size": 7}, {"num_heads": 3, "kernel": 2}],
}
CASES = [(name, {}) for name in mixers.names()] + [(name, o) for name, list_ in OPTIONS.items() for o in list_]
LENGTHS = [1, 2, 63, 65, 300]


def build(name, options, dtype=torch.float64, **more):
    torch.manual_seed(0)
    mixer = mixers.load(name)
    made = mixer(from_dict(mixer.Config, {"width": WIDTH, **options, **more})).to(dtype)
    for parameter in made.parameters():  # away from symmetric starts, where a wrong gradient could hide
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made


def inputs(batch, length, dtype=torch.float64):
    return torch.randn(batch, length, WIDTH, dtype=dtype)


def same_state(left, right, tolerance=1e-9):
    left, right = pytree.tree_leaves(left), pytree.tree_leaves(right)
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


cases = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value))


def test_names_and_files_agree():
    for name in mixers.names():
        assert name_of(mixers.load(name)) == name


@cases
def test_the_state_is_a_value_with_sequences_first(name, options):
    mixer = build(name, options)
    for state in (mixer.init_state(3), mixer(inputs(3, 5))[1]):
        assert all(leaf.shape[0] == 3 for leaf in pytree.tree_leaves(state))


@cases
@pytest.mark.parametrize("length", LENGTHS)
def test_forms_agree(name, options, length):
    mixer = build(name, options)
    x = inputs(2, length)
    prefix = mixer(inputs(2, 7))[1]
    prefix = pytree.tree_map(torch.detach, prefix)
    results = {}
    for form in sorted(mixer.traits.forms):
        own = x.clone().requires_grad_()
        y, state = mixer(own, prefix, Context(form=form))
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        gradients = torch.autograd.grad((y * weight).sum(), [own, *mixer.parameters()], allow_unused=True)
        results[form] = (y, state, [g for g in gradients if g is not None])
    first, *others = results.values()
    for other in others:
        torch.testing.assert_close(first[0], other[0], atol=1e-9, rtol=1e-9)
        same_state(first[1], other[1])
        for one, two in zip(first[2], other[2], strict=True):
            torch.testing.assert_close(one, two, atol=1e-8, rtol=1e-8)


@cases
def test_a_changed_future_leaves_the_past_alone(name, options):
    mixer = build(name, options, torch.float32)
    x = inputs(2, 130, torch.float32)
    changed = x.clone()
    changed[:, 70:] += 100.0
    for form in ("auto", *sorted(mixer.traits.forms)):
        before, after = (mixer(value, None, Context(form=form))[0] for value in (x, changed))
        assert torch.equal(before[:, :70], after[:, :70])
        assert not torch.equal(before[:, 70:], after[:, 70:])


@cases
def test_prefix_state_and_rest_make_the_whole(name, options):
    mixer = build(name, options)
    x = inputs(2, 21)
    whole, end = mixer(x)
    for cut in range(22):
        left, state = mixer(x[:, :cut])
        right, state = mixer(x[:, cut:], state)
        torch.testing.assert_close(torch.cat([left, right], dim=1), whole, atol=1e-9, rtol=1e-9)
        same_state(state, end)


@cases
def test_one_token_at_a_time(name, options):
    mixer = build(name, options)
    x = inputs(2, 40)
    whole, _ = mixer(x)
    state, outputs = mixer.init_state(2), []
    with torch.no_grad():
        for t in range(40):
            y, state = mixer(x[:, t : t + 1], state)
            outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, atol=1e-9, rtol=1e-9)


@cases
def test_a_snapshot_can_be_continued_twice(name, options):
    mixer = build(name, options)
    with torch.no_grad():
        prefix = inputs(1, 9)
        _, snapshot = mixer(prefix)
        _, snapshot = mixer(inputs(1, 1), snapshot)  # a state that has already grown in place
        one, other = inputs(1, 6), inputs(1, 6)
        first, after_first = mixer(one, snapshot)
        second, _ = mixer(other, snapshot)
        again, after_again = mixer(one, snapshot)
        assert torch.equal(first, again)
        same_state(after_first, after_again, 0.0)
        assert not torch.equal(first, second)


@cases
def test_states_are_batched_by_concatenation(name, options):
    mixer = build(name, options)
    with torch.no_grad():
        states = [mixer(inputs(1, 8))[1] for _ in range(3)]
        together = pytree.tree_map(lambda *leaves: torch.cat(leaves), *states)
        x = inputs(3, 4)
        y, _ = mixer(x, together)
        for row, state in enumerate(states):
            torch.testing.assert_close(y[row : row + 1], mixer(x[row : row + 1], state)[0], atol=1e-9, rtol=1e-9)


@cases
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("lengths", [(5, 0, 11, 1), (6,)])
def test_padding_changes_nothing(name, options, side, lengths):
    mixer = build(name, options)
    longest = max(lengths) + 3
    rows, real = torch.full((len(lengths), longest, WIDTH), 1e3, dtype=torch.float64), []
    for row, length in enumerate(lengths):
        start = {"left": longest - length, "right": 0, "both": (longest - length) // 2}[side]
        rows[row, start : start + length] = inputs(1, length)[0]
        real.append(range(start, start + length))
    padding = torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, places in enumerate(real):
        padding[row, list(places)] = True
    prefixes = [mixer(inputs(1, 4 + row))[1] for row in range(len(lengths))]
    for start in ("nothing", "prefix"):
        if start == "prefix" and len({tuple(leaf.shape) for leaf in pytree.tree_leaves(prefixes[0])}) == 0:
            continue
        state = None if start == "nothing" else join(mixer, prefixes)
        y, after = mixer(rows, state, Context(padding=padding))
        follow, _ = mixer(inputs(len(lengths), 1).fill_(0.5), after)
        for row, places in enumerate(real):
            own = None if start == "nothing" else prefixes[row]
            expected, own_after = mixer(rows[row : row + 1, list(places)], own)
            torch.testing.assert_close(y[row, list(places)], expected[0], atol=1e-9, rtol=1e-9)
            expected, _ = mixer(inputs(1, 1).fill_(0.5), own_after)
            torch.testing.assert_close(follow[row : row + 1], expected, atol=1e-9, rtol=1e-9)


def join(mixer, states):
    """One state of sequences of unequal lengths: a constant one is concatenated, a growing one is padded before it."""

    def padded(leaf, longest):
        return torch.nn.functional.pad(leaf, (0, 0, 0, 0, longest - leaf.shape[1], 0)) if leaf.dim() == 4 else leaf

    longest = 0 if mixer.traits.growth == "constant" else max(state.keys.shape[1] for state in states)
    if longest:
        states = [pytree.tree_map(lambda leaf: padded(leaf, longest), state) for state in states]
    return pytree.tree_map(lambda *leaves: torch.cat(leaves), *states)


@cases
def test_packed_sequences_do_not_see_each_other(name, options):
    mixer = build(name, options)
    lengths = [3, 1, 0, 70, 2]
    parts = [inputs(1, length) for length in lengths]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    y, state = mixer(torch.cat(parts, dim=1), None, Context(cu_seqlens=cu_seqlens))
    more = inputs(len(lengths), 2)
    follow, _ = mixer(more, state)
    for i, part in enumerate(parts):
        expected, own = mixer(part)
        torch.testing.assert_close(y[:, cu_seqlens[i] : cu_seqlens[i + 1]], expected, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(follow[i : i + 1], mixer(more[i : i + 1], own)[0], atol=1e-9, rtol=1e-9)


@cases
def test_gradients_are_right(name, options):
    mixer = build(name, options)
    x = inputs(1, 5).requires_grad_()
    state = mixer(inputs(1, 3))[1]
    leaves, spec = pytree.tree_flatten(state)
    floats = [i for i, leaf in enumerate(leaves) if leaf.is_floating_point()]
    free = [leaves[i].detach().requires_grad_() for i in floats]

    def run(x, *free):
        filled = list(leaves)
        for i, leaf in zip(floats, free, strict=True):
            filled[i] = leaf
        return mixer(x, pytree.tree_unflatten(filled, spec))[0]

    assert torch.autograd.gradcheck(run, (x, *free), eps=1e-6, atol=1e-5)


@cases
def test_every_parameter_gets_a_gradient(name, options):
    mixer = build(name, options)
    y, _ = mixer(inputs(2, 80))
    y.square().sum().backward()
    for label, parameter in mixer.named_parameters():
        dead = options.get("window") == 1 and label.split(".")[0] in {"q", "k", "q_norm", "k_norm"}
        assert parameter.grad is not None
        assert dead or bool((parameter.grad != 0).any()), label


@cases
def test_bfloat16_stays_close(name, options):
    mixer = build(name, options, torch.float32)
    x = inputs(2, 100, torch.float32)
    exact, _ = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = mixer(x)
    error = ((rough.float() - exact).norm() / exact.norm()).item()
    assert error < 3e-2, f"relative error {error:.3g}"


@cases
def test_cost_is_what_it_says(name, options):
    mixer = build(name, options, torch.float32)
    for length in (0, 37):
        cost = mixer.cost(mixer.config, length)
        state = mixer(inputs(1, length, torch.float32))[1] if length else mixer.init_state(1)
        assert cost.state_bytes == sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(state))
        assert cost.parameters == sum(parameter.numel() for parameter in mixer.parameters())
        assert cost.flops_per_token == counted_flops(mixer, length)


def counted_flops(mixer, length):
    """Of one token in the recurrent form: linear layers by hooks, convolutions and memories by their shapes."""
    total = 0

    def linear(module, arguments, output):
        nonlocal total
        total += 2 * module.weight.numel()

    hooks = [m.register_forward_hook(linear) for m in mixer.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        state = mixer(inputs(1, length, torch.float32))[1] if length else mixer.init_state(1)
        total = 0
        mixer(inputs(1, 1, torch.float32), state)
    for hook in hooks:
        hook.remove()
    for label, module in mixer.named_modules():
        if label.endswith("_conv"):
            total += 2 * module.weight.numel()
    memory = getattr(state, "memory", None)
    if memory is not None:
        total += {"gated_deltanet": 6}.get(name_of(type(mixer)), 4) * memory.numel()  # the delta rule reads once more
        if name_of(type(mixer)) == "linear_attention" and mixer.config.feature_map != "identity":
            total += 4 * state.normalizer.numel()
    else:
        seen = state.keys.shape[1] + 1
        total += 4 * mixer.config.width * seen
    return total


@cases
def test_configs_and_weights_survive_a_round_trip(name, options):
    mixer = build(name, options)
    config = from_dict(type(mixer).Config, to_dict(mixer.config))
    assert config == mixer.config
    other = type(mixer)(config).double()
    other.load_state_dict(mixer.state_dict())
    x = inputs(1, 12)
    assert torch.equal(mixer(x)[0], other(x)[0])


@cases
def test_hard_inputs_give_no_nan(name, options):
    mixer = build(name, options, torch.float32)
    for scale in (0.0, 1e-20, 1e4):
        x = (inputs(1, 70, torch.float32) * scale).requires_grad_()
        y, _ = mixer(x)
        assert torch.isfinite(y).all(), scale
        y.sum().backward()
        assert torch.isfinite(x.grad).all(), scale


@cases
def test_an_empty_call_leaves_the_state(name, options):
    mixer = build(name, options)
    _, state = mixer(inputs(2, 6))
    y, after = mixer(inputs(2, 0), state)
    assert y.shape == (2, 0, WIDTH)
    same_state(state, after, 0.0)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="Nearest: `gated_deltanet`"):
        mixers.load("gated_deltnet")
    with pytest.raises(ValueError, match="Nearest: `num_heads`"):
        from_dict(mixers.load("attention").Config, {"width": 8, "num_head": 2})
    with pytest.raises(ValueError, match="Nearest: 96 or 104"):
        from_dict(mixers.load("attention").Config, {"width": 100, "num_heads": 8})


def test_traits_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        mixers.load("attention").traits.trees = True
