"""The laws of the contract, for every mixer that `mixers.names()` finds and the options of tests/variants.py.

A mixer of your own is checked by `pytest tests/mixers/test_laws.py --mixer package.module:Class`.
"""

import dataclasses
import math

import pytest
import torch
from counting import counting
from torch.utils import _pytree as pytree
from variants import VARIANTS, names

from everlong import mixers
from everlong.config import from_dict, to_dict
from everlong.mixers.base import Context, name_of
from everlong.models.lm import LanguageModel, ModelConfig

WIDTH = 36  # an odd number of heads of an odd half size
AT_ONCE = 4  # cases of a mixer that `make test` runs; `make test-all` runs all
CASES = [
    pytest.param(name, options, marks=[pytest.mark.slow] if place >= AT_ONCE else [])
    for name in names()
    for place, options in enumerate(({}, *VARIANTS.get(name, ())))
]
LENGTHS = [1, 2, 63, 65, 300]


def is_causal(name, options):
    return options.get("causal", mixers.load(name).traits.causal)


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


def every(cases):
    return pytest.mark.parametrize(("name", "options"), cases, ids=lambda value: str(value))


cases = every(CASES)
causal_cases = every([case for case in CASES if is_causal(*case.values)])


def test_names_and_files_agree():
    for name in names():
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
        results[form] = (y, state, gradients_of(y, [own, *mixer.parameters()]))
    first, *others = results.values()
    for other in others:
        torch.testing.assert_close(first[0], other[0], atol=1e-9, rtol=1e-9)
        same_state(first[1], other[1])
        for one, two in zip(first[2], other[2], strict=True):
            torch.testing.assert_close(one, two, atol=1e-8, rtol=1e-8)


def gradients_of(y, leaves):
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    gradients = torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]


@cases
@pytest.mark.parametrize("length", [1, 2, 37])
def test_the_layer_is_the_papers_loop(name, options, length):
    mixer = build(name, options)
    results = []
    for run in (lambda x: mixer(x)[0], lambda x: mixer.reference(x[0])[None]):
        x = torch.randn(1, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        y = run(x.requires_grad_())
        results.append((y, gradients_of(y, [x, *mixer.parameters()])))
    (ours, own), (loop, expected) = results
    torch.testing.assert_close(ours, loop, atol=1e-9, rtol=1e-9)
    for label, one, other in zip(["x", *dict(mixer.named_parameters())], own, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8, msg=lambda text, label=label: f"{label}: {text}")


@pytest.mark.parametrize("name", names())
def test_odd_widths(name):
    torch.manual_seed(0)
    mixer = mixers.load(name)
    for width in (1, 33):
        try:
            made = mixer(mixer.Config(width=width)).double()
        except ValueError as error:  # such as a rotation, which turns pairs of channels
            assert "even" in str(error)  # noqa: PT017
            continue
        x = torch.randn(1, 65, width, dtype=torch.float64)
        y, _ = made(x)
        torch.testing.assert_close(y[0], made.reference(x[0]), atol=1e-9, rtol=1e-9)


@causal_cases
def test_a_changed_future_leaves_the_past_alone(name, options):
    mixer = build(name, options)
    rounding = mixer.traits.fft_forms | ({"auto"} if mixer.traits.fft_forms else set())
    for dtype in (torch.float64, torch.float32):
        mixer, x = mixer.to(dtype), inputs(2, 130, dtype)
        changed = x.clone()
        changed[:, 70:] += 100.0
        for form in ("auto", *sorted(mixer.traits.forms)):
            before, after = (mixer(value, None, Context(form=form))[0] for value in (x, changed))
            assert not torch.equal(before[:, 70:], after[:, 70:])
            if form not in rounding:
                assert torch.equal(before[:, :70], after[:, :70])
            elif dtype == torch.float64:  # of what goes through the transform, the changed future included
                error = (before[:, :70] - after[:, :70]).abs().max() / max(before.abs().max(), after.abs().max())
                assert error < 1e-12


@causal_cases
def test_prefix_state_and_rest_make_the_whole(name, options):
    mixer = build(name, options)
    x = inputs(2, 21)
    whole, end = mixer(x)
    for cut in range(22):
        left, state = mixer(x[:, :cut])
        right, state = mixer(x[:, cut:], state)
        torch.testing.assert_close(torch.cat([left, right], dim=1), whole, atol=1e-9, rtol=1e-9)
        same_state(state, end)


@causal_cases
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


@causal_cases
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


@causal_cases
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
        if start == "prefix" and not is_causal(name, options):
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
    """One state of sequences of unequal lengths: what has grown further than others stands at the end of its row."""

    def joined(*leaves):
        longest = max(leaf.shape[1] for leaf in leaves) if leaves[0].dim() > 1 else 0
        after = (0, 0) * (leaves[0].dim() - 2)
        if not longest or mixer.traits.growth == "constant":
            return torch.cat(leaves)
        return torch.cat([torch.nn.functional.pad(leaf, (*after, longest - leaf.shape[1], 0)) for leaf in leaves])

    return pytree.tree_map(joined, *states)


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


def check_gradients(name, options, fast):
    mixer = build(name, options)
    x = inputs(1, 5).requires_grad_()
    state = mixer(inputs(1, 3))[1]
    leaves, spec = pytree.tree_flatten(state)
    floats = [i for i, leaf in enumerate(leaves) if leaf.is_floating_point() and is_causal(name, options)]
    if not fast and sum(leaves[i].numel() for i in floats) > 5_000:  # of a large state only along directions
        floats = []
    free = [leaves[i].detach().requires_grad_() for i in floats]

    def run(x, *free):
        filled = list(leaves)
        for i, leaf in zip(floats, free, strict=True):
            filled[i] = leaf
        return mixer(x, pytree.tree_unflatten(filled, spec))[0]

    assert torch.autograd.gradcheck(run, (x, *free), eps=1e-6, atol=1e-5, fast_mode=fast)


@cases
def test_gradients_are_right(name, options):
    """Along random directions."""
    check_gradients(name, options, fast=True)


@pytest.mark.slow
@cases
def test_every_entry_of_the_gradients_is_right(name, options):
    check_gradients(name, options, fast=False)


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
    causal = is_causal(name, options)
    for length in (0, 1, 37, 70) if causal else (1, 37):
        cost = mixer.cost(mixer.config, length)
        x = inputs(1, length, torch.float32)
        state = mixer(x)[1] if length else mixer.init_state(1)
        assert cost.state_bytes == sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(state))
        assert cost.parameters == sum(parameter.numel() for parameter in mixer.parameters())
        double = build(name, options)  # torch's recurrent kernels cannot be counted in float32
        state = double(x.double())[1] if causal and length else None
        with counting(type(mixer).__module__) as counter:
            double(inputs(1, 1) if causal else x.double(), state)
        assert cost.flops_per_token == counter.flops // (1 if causal else length), length


@causal_cases
def test_the_state_grows_as_declared(name, options):
    """By `cost`, of which the law above says that it is true."""
    mixer = mixers.load(name)
    config = from_dict(mixer.Config, {"width": WIDTH, **options})
    sizes = [mixer.cost(config, length).state_bytes for length in (0, 1, 1_000, 100_000, 200_000)]
    growth = mixer.traits.growth
    assert growth != "constant" or len(set(sizes)) == 1
    assert growth != "window" or sizes[-1] == sizes[-2]
    assert growth != "linear" or options or sizes == sorted(set(sizes))


@cases
def test_a_form_that_is_not_there_is_refused(name, options):
    mixer = build(name, options)
    with pytest.raises(ValueError, match="unknown form of `.*There is: .*auto"):
        mixer(inputs(1, 2), None, Context(form="sideways"))
    for form in {"parallel", "chunk", "recurrent"} - mixer.traits.forms:
        with pytest.raises(ValueError, match=f"unknown form of `{name}` `{form}`"):
            mixer(inputs(1, 2), None, Context(form=form))


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


def ordeal(name, options, steps):
    """Tokens that shut and open every gate, huge, zero and alike, with one state carried through all of them."""
    mixer = build(name, options, torch.float32)
    random = torch.Generator().manual_seed(3)
    state = mixer.init_state(2)
    for step in range(steps):
        length = int(torch.randint(1, 7, (), generator=random))
        scale = (0.0, 1.0, 30.0, 1e4)[int(torch.randint(4, (), generator=random))]
        kind = torch.randint(3, (), generator=random)
        x = torch.randn(2, length, WIDTH, generator=random)
        x = scale * (x if kind == 0 else x.sign() if kind == 1 else torch.ones_like(x))
        with torch.set_grad_enabled(step % 20 == 0):
            y, state = mixer(x.requires_grad_(step % 20 == 0), state)
        assert torch.isfinite(y).all(), step
        if step % 20 == 0:
            y.sum().backward()
            assert torch.isfinite(x.grad).all(), step
        state = pytree.tree_map(torch.detach, state)
        assert not any(torch.isnan(leaf).any() for leaf in pytree.tree_leaves(state)), step


@cases
def test_no_input_breaks_the_state(name, options):
    ordeal(name, options, 200)


@pytest.mark.slow
@cases
def test_no_input_breaks_the_state_in_the_long_run(name, options):
    ordeal(name, options, 4_000)


@pytest.mark.parametrize("name", names())
def test_a_small_model_learns(name):
    """The first token says which of two orders the others follow. Who does not remember it is left with ln 2 nats.

    Where no order of tokens exists, every token has to say what the first one was.
    """
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    causal = is_causal(name, {})
    order = torch.randperm(8, generator=random)
    orders = torch.stack([order, (order + 1) % 8])  # which differ behind every token
    model = LanguageModel(ModelConfig(vocab_size=10, width=32, num_layers=1, layers=(name,), feed_forward=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(200):
        key = torch.randint(2, (16,), generator=random)
        tokens = [torch.randint(8, (16,), generator=random)]
        for _ in range(20):
            tokens.append(orders[key, tokens[-1]])
        sequence = torch.stack([8 + key, *tokens], 1)
        x, _ = model.hidden(sequence[:, :-1])
        targets = sequence[:, 1:] if causal else (8 + key)[:, None].expand_as(sequence[:, 1:])
        loss = torch.nn.functional.cross_entropy(model.logits(x)[:, 1:].flatten(0, 1), targets[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.5 * math.log(2)


@causal_cases
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
