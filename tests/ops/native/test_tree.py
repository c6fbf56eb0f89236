"""The kernels over trees: what the plain operators give along every path, and the laws of all kernels."""

import functools
import math
import runpy
from pathlib import Path

import kernel_laws as laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_laws import ADVERSARIES, assert_close, gates, normal
from oracles import flat, rms

from everlong.ops import causal_conv1d, commit, delta_rule, dplr, linear_attention, softmax_attention, use_backend
from everlong.ops.native import tree_commit, tree_convolution, tree_memory, tree_softmax

TREES = runpy.run_path(str(Path(__file__).parents[1] / "test_tree.py"))
MEMORIES, BUSHY, trees, path_to = (TREES[name] for name in ("MEMORIES", "BUSHY", "trees", "path_to"))
every_memory = pytest.mark.parametrize("case", MEMORIES, ids=str)
CHAIN = [*range(-1, 255)]
WIDE = [-1, *[0] * 40, *range(1, 41)]
ROOTS = [-1] * 33


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def rounded(leaves, dtype):
    """The same numbers in `dtype`, states in float32; and these in float64."""
    given = {name: x.float() if name.startswith("state") else x.to(dtype) for name, x in leaves.items()}
    return given, {name: x.double() for name, x in given.items()}


def outcome(case, leaves, parents, **options):
    """What each node gives and the states after some paths, in one list."""
    with use_backend(options.get("backend", "auto")):
        return flat(TREES["over_tree"](case, parents, **options)(leaves))


def check(case, leaves, parents, dtype=torch.float32):
    given, exact = rounded(leaves, dtype)
    expected = flat(TREES["ordinary"](case, parents)(exact))
    found = outcome(case, given, parents, backend="native")
    assert [x.dtype for x in found] == [dtype, *[torch.float32] * (len(found) - 1)]
    assert_close(found, expected, laws.BOUND[dtype], case.floor)


@every_memory
@settings(max_examples=15, deadline=None, derandomize=True)
@given(parents=trees, batch=st.integers(1, 3))
def test_every_node_ends_a_sequence(case, parents, batch):
    for dtype in laws.BOUND:
        check(case, case.leaves(batch, len(parents)), parents, dtype)


@every_memory
@pytest.mark.parametrize("name", ADVERSARIES)
def test_decays_of_any_strength(case, name):
    leaves = case.leaves(2, len(BUSHY))
    if "log_decay" in leaves:
        leaves["log_decay"] = ADVERSARIES[name](leaves["log_decay"])
        check(case, leaves, BUSHY)


@every_memory
@pytest.mark.parametrize("parents", [CHAIN, WIDE, ROOTS], ids=["chain", "wide", "roots"])
def test_deep_and_wide_trees(case, parents):
    """Of a chain the truth is the plain operator's own; of the others that of the reference over trees."""
    given, exact = rounded(case.leaves(2, len(parents)), torch.float32)
    expected = outcome(case, exact, parents, backend="reference")
    assert_close(outcome(case, given, parents, backend="native"), expected, 1e-5, case.floor)
    if parents is CHAIN:
        o, last = case.call(exact, backend="reference")
        path = path_to(parents, len(parents) - 1)
        found, records = case.call(given, parents=torch.tensor(parents), backend="native")
        with use_backend("native"):
            assert_close([found, *flat(commit(records, path))], [o, *flat(last)], 1e-5, case.floor)


def large(operator, channels, values, decay, batch=2, nodes=16, heads=4, shared=2):
    """Inputs as models have them; `decay` is a number of axes of `log_decay`, 0 for none."""
    q, k = (torch.nn.functional.normalize(normal(batch, nodes, shared, channels), dim=-1) for _ in range(2))
    inputs = {"q": q, "k": k, "v": normal(batch, nodes, heads, values)}
    if decay:
        inputs["log_decay"] = gates(*(batch, nodes, heads, channels)[:decay])
    if operator is delta_rule:
        inputs["beta"] = torch.rand(batch, nodes, heads)
    if operator is dplr:
        inputs |= {"a": -k, "b": torch.rand(batch, nodes, heads, 1) * k.repeat_interleave(heads // shared, 2)}
    return inputs | {"initial_state": normal(batch, heads, channels, values)}


@pytest.mark.parametrize("sizes", [(64, 64), (128, 64), (80, 37), (1, 130), (17, 16)], ids=str)
@pytest.mark.parametrize(
    ("operator", "decay"), [(linear_attention, 0), (linear_attention, 3), (delta_rule, 3), (delta_rule, 4), (dplr, 4)]
)
def test_numbers_of_any_count_may_lie_anywhere(operator, decay, sizes):
    inputs = large(operator, *sizes, decay)
    options, path = {"parents": torch.tensor([*BUSHY, 5, 14])}, [0, 2, 5, 14, 15]
    expected, truth = operator(**{name: x.double() for name, x in inputs.items()}, **options, backend="reference")
    scattered = {name: laws.scattered(x) for name, x in inputs.items()}
    turned = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in inputs.items()}
    for used in (inputs, scattered, turned):
        o, records = operator(**used, **options, backend="native")
        assert rms(o, expected) < 1e-5
        with use_backend("native"):
            assert rms(commit(records, path), commit(truth, path)) < 1e-5


@every_memory
def test_rows_take_their_own_paths(case):
    given, _ = rounded(case.leaves(3, len(BUSHY)), torch.float32)
    for backend in ("native", "torch"):
        _, records = case.call(given, parents=torch.tensor(BUSHY), backend=backend)
        for paths in ([[0, 2, 5], [], [6, 7, 13]], [[], [], []], [torch.tensor([0, 1]), [6], [0, 1]]):
            with use_backend("torch"):
                expected = flat(commit(records, paths))
                alone = [flat(commit(records, path)) for path in paths]
            with use_backend("native"):
                found = flat(commit(records, paths))
            for x, y, *rows in zip(found, expected, *alone, strict=True):
                assert_close([x, x], [y, torch.cat([row[i, None] for i, row in enumerate(rows)])], 1e-6)
    with pytest.raises(ValueError, match="one `path` for all rows, or one for each of the 3: got 2 paths"):
        commit(records, [[0], [6]])
    with pytest.raises(ValueError, match="where 0 comes before 6, whose parent is -1"):
        commit(records, [[0], [6], [0, 6]])


@every_memory
@pytest.mark.parametrize("other", [1e3, math.inf, math.nan])
def test_other_branches_are_out_of_reach(case, other):
    given, _ = rounded(case.leaves(2, len(BUSHY)), torch.float32)
    call = functools.partial(case.call, parents=torch.tensor(BUSHY), backend="native")
    before, records = call(given)
    for changed in (1, 6, 13):
        spoilt = {name: x.clone() for name, x in given.items()}
        for name in case.tokens:
            spoilt[name][:, changed] = torch.randn_like(spoilt[name][:, changed]) * other
        after, spoilt_records = call(spoilt)
        for node in range(len(BUSHY)):
            assert torch.equal(after[:, node], before[:, node]) == (changed not in path_to(BUSHY, node))
        pairs = zip(*(flat(commit(r, path_to(BUSHY, 5))) for r in (records, spoilt_records)), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


def repeated(run):
    """Twice the same call, and one thread or several: equal bit for bit."""
    before, outcomes = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            outcomes.append(flat(run()))
    finally:
        torch.set_num_threads(before)
    for other in outcomes[1:]:
        assert all(torch.equal(*pair) for pair in zip(other, outcomes[0], strict=True))
    return outcomes[0]


@pytest.mark.parametrize("decay", [3, 4])
@pytest.mark.parametrize("operator", [linear_attention, delta_rule, dplr])
def test_neither_threads_nor_other_rows_change_a_bit(operator, decay):
    inputs = large(operator, 64, 64, 4 if operator is dplr else decay, batch=3)
    parents, paths = torch.tensor([*BUSHY, 5, 14]), [[0, 2, 5, 14], [6], [0, 1]]

    def run(rows=slice(None)):
        given = {name: x[rows] for name, x in inputs.items()}
        o, records = operator(**given, parents=parents, backend="native")
        with use_backend("native"):
            return o, commit(records, paths[rows])

    o, states = repeated(run)
    alone, state = run(slice(1, 2))
    assert torch.equal(alone, o[1:2])
    assert torch.equal(state, states[1:2])


def convolution(batch, nodes, channels, taps, dtype):
    shapes = {"x": (batch, nodes, channels), "weight": (channels, taps), "bias": (channels,)}
    given = {name: normal(*shape).to(dtype) for name, shape in shapes.items()}
    return given | {"state": normal(batch, taps - 1, channels)}


@pytest.mark.parametrize("dtype", laws.BOUND, ids=str)
@pytest.mark.parametrize("taps", [1, 2, 4, 9])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(parents=trees, activation=st.sampled_from([None, "silu"]), channels=st.sampled_from([1, 3, 16, 70, 300]))
def test_convolution_of_each_path(parents, taps, activation, channels, dtype):
    given, options = convolution(2, len(parents), channels, taps, dtype), {"activation": activation}
    exact = {name: x.double() for name, x in given.items()}
    for inputs in (given, {name: laws.scattered(x) for name, x in given.items()}, {**given, "bias": None}):
        if inputs["bias"] is None:
            exact["bias"] = None
        y, records = causal_conv1d(
            **inputs, **options, parents=torch.tensor(parents, dtype=torch.long), backend="native"
        )
        assert y.dtype == dtype
        for node in range(len(parents)):
            path = path_to(parents, node)
            along, state = causal_conv1d(**{**exact, "x": exact["x"][:, path]}, **options, backend="reference")
            assert rms(y[:, node], along[:, -1]) < laws.BOUND[dtype]
            assert torch.equal(commit(records, path), state.float())


def test_convolution_is_the_same_to_the_bit():
    given, parents = convolution(3, 40, 700, 4, torch.float32), torch.tensor([-1, *range(20), *range(19)])
    (y,) = repeated(lambda: causal_conv1d(**given, parents=parents, backend="native")[:1])
    row = {name: x[1:2] if name in ("x", "state") else x for name, x in given.items()}
    assert torch.equal(causal_conv1d(**row, parents=parents, backend="native")[0], y[1:2])
    for other in (1e3, math.inf, math.nan):
        given["x"][:, 5] = other
        after, _ = causal_conv1d(**given, parents=parents, backend="native")
        for node in range(40):
            assert torch.equal(after[:, node], y[:, node]) == (5 not in path_to(parents.tolist(), node)[-4:])


@torch.enable_grad()
def test_gradients_are_those_of_torch():
    inputs = large(delta_rule, 5, 3, 3)
    parents, weights = torch.tensor([*BUSHY, 5, 14]), torch.randn(2, 4, 5, 3)
    gradients = []
    for backend in ("native", "torch"):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        with use_backend(backend):
            o, records = delta_rule(**leaves, parents=parents)
            loss = o.square().sum() + (commit(records, [0, 2, 5]) * weights).sum()
        gradients.append(torch.autograd.grad(loss, list(leaves.values())))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_torch_knows_the_operators():
    parents, paths = torch.tensor(BUSHY[:9]), torch.tensor([[0, 2, -1], [6, 7, -1]])
    linear, delta, low_rank = (large(operator, 5, 3, 4, nodes=9) for operator in (linear_attention, delta_rule, dplr))
    state, total = linear.pop("initial_state"), normal(2, 4, 5)
    tokens = linear["q"], linear["k"], linear["v"], linear["log_decay"]
    bonus, beta, others = normal(4, 5), delta["beta"], (low_rank["a"], low_rank["b"])
    for rule in ((bonus, None, None, None), (None, beta, None, None), (None, None, *others)):
        sums = total if rule[0] is not None else None
        torch.library.opcheck(tree_memory._memory, (*tokens, *rule, state, sums, parents, 0.5))
    for more, sums in (((None, None), total), ((linear["q"], linear["v"]), None)):
        torch.library.opcheck(tree_commit._commit, (paths, *tokens[1:3], *more, tokens[3], state, sums))
    x, weight, bias, before = convolution(2, 9, 5, 4, torch.float32).values()
    torch.library.opcheck(tree_convolution._convolution, (x, weight, bias, before, parents, True))
    for lengths in (None, torch.tensor([9, 20])):
        torch.library.opcheck(tree_softmax._attention, (*cache(2, 9, 11), parents, lengths, 7, 0.5))


def cache(batch, nodes, prefix, heads=4, groups=2, channels=5, width=3, dtype=torch.float32):
    shapes = (nodes, heads, channels), (prefix + nodes, groups, channels), (prefix + nodes, groups, width)
    return [normal(batch, *shape).to(dtype) for shape in shapes]


def check_attention(q, k, v, parents, **options):
    bound, exact = laws.BOUND[q.dtype], [x.double() for x in (q, k, v)]
    options |= {"parents": torch.tensor(parents), "return_lse": True}
    expected, truth = softmax_attention(*exact, **options, backend="reference")
    o, lse = softmax_attention(q, k, v, **options, backend="native")
    assert (o.dtype, lse.dtype) == (v.dtype, torch.float32)
    assert_close([o, lse], [expected, truth], bound)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    parents=trees.filter(len),
    prefix=st.integers(0, 140),
    window=st.none() | st.integers(1, 40),
    shape=st.sampled_from([(4, 2, 5, 3), (2, 2, 16, 16), (6, 1, 17, 70), (1, 1, 1, 1), (8, 2, 64, 64)]),
    dtype=st.sampled_from(list(laws.BOUND)),
)
def test_attention_of_each_path(parents, prefix, window, shape, dtype):
    check_attention(*cache(2, len(parents), prefix, *shape, dtype=dtype), parents, window=window)


@pytest.mark.parametrize("parents", [CHAIN[:100], WIDE, ROOTS], ids=["chain", "wide", "roots"])
@pytest.mark.parametrize("window", [None, 3, 50])
def test_attention_over_deep_and_wide_trees_anywhere(parents, window):
    q, k, v = cache(1, len(parents), 70, 2, 1)
    for used in ((q, k, v), [laws.scattered(x) for x in (q, k, v)], [x.mT.contiguous().mT for x in (q, k, v)]):
        check_attention(*used, parents, window=window)


def test_attention_to_a_long_cache():
    """Scores of any size, in several parts."""
    q, k, v = cache(2, len(BUSHY), 2500)
    for strength in (1.0, 60.0):
        options = {"parents": torch.tensor(BUSHY), "return_lse": True, "scale": strength}
        expected = softmax_attention(q.double(), k.double(), v.double(), **options, backend="torch")
        assert_close([*softmax_attention(q, k, v, **options, backend="native")], [*expected], 1e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_attention_with_rows_of_different_lengths(window):
    q, k, v = cache(3, len(BUSHY), 80)
    lengths = [14, 94, 40]
    for row, length in enumerate(lengths):
        k[row, length:] = v[row, length:] = math.nan
    options = {"parents": torch.tensor(BUSHY), "window": window}
    for real in (torch.tensor(lengths), torch.tensor(lengths, dtype=torch.int32)):
        o = softmax_attention(q, k, v, key_lengths=real, backend="native", **options)
        for row, length in enumerate(lengths):
            alone = q[row, None].double(), k[row, None, :length].double(), v[row, None, :length].double()
            assert rms(o[row, None], softmax_attention(*alone, backend="reference", **options)) < 1e-5


@pytest.mark.parametrize("other", [1e3, math.inf, math.nan])
def test_attention_does_not_reach_other_branches(other):
    """Nor what is before the window."""
    q, k, v = cache(2, len(BUSHY), 90)
    for window in (None, 3):
        options = {"parents": torch.tensor(BUSHY), "window": window, "backend": "native"}
        before = softmax_attention(q, k, v, **options)
        for changed in (1, 6, 13):
            spoilt = [x.clone() for x in (q, k, v)]
            for x, place in zip(spoilt, (changed, 90 + changed, 90 + changed), strict=True):
                x[:, place] = torch.randn_like(x[:, place]) * other
            after = softmax_attention(*spoilt, **options)
            for node in range(len(BUSHY)):
                seen = path_to(BUSHY, node)[-(window or 99) :]
                assert torch.equal(after[:, node], before[:, node]) == (changed not in seen)
        if window is not None:
            for x in (k, v):
                x[:, :88] = other
            assert torch.equal(softmax_attention(q, k, v, **options), before)


def test_attention_is_the_same_to_the_bit():
    q, k, v = cache(3, 20, 2100, 8, 2, 64, 64)
    options = {"parents": torch.tensor([-1, *range(10), *range(9)]), "backend": "native", "return_lse": True}
    o, lse = repeated(lambda: softmax_attention(q, k, v, **options))
    alone = softmax_attention(q[1:2], k[1:2], v[1:2], **options)
    assert all(torch.equal(one, several[1:2]) for one, several in zip(alone, (o, lse), strict=True))


@torch.enable_grad()
def test_attention_with_gradients_is_that_of_torch():
    inputs, gradients = cache(2, len(BUSHY), 9), []
    for backend in ("native", "torch"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        o = softmax_attention(*leaves, parents=torch.tensor(BUSHY), backend=backend)
        gradients.append(torch.autograd.grad(o.square().sum(), leaves))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
