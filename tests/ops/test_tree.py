"""Operators over trees: every node is the end of an ordinary sequence, that of its path from the root."""

import functools
import itertools
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_laws import ADVERSARIES, H, K, assert_close, normal
from oracles import rms, with_gradients

from everlong.ops import KeyRecords, causal_conv1d, commit, linear_attention, softmax_attention
from everlong.ops.tree import Tree

OTHERS = [runpy.run_path(str(Path(__file__).with_name(f"test_{name}.py"))) for name in ("recurrence", "delta")]
MEMORIES = [
    *(case for other in OTHERS for case in other["CASES"]),
    OTHERS[0]["make"]("bonus, decay of tokens", decay=(H,), heads=2, constants={"bonus": lambda: normal(H, K)}),
]
WAYS = [{"backend": "reference"}, {"backend": "torch"}, {"backend": "torch", "form": "recurrent"}]
every_memory = pytest.mark.parametrize("case", MEMORIES, ids=str)
BUSHY = [-1, 0, 0, 1, 1, 2, -1, 6, 3, 3, 8, 0, 10, 7]
trees = st.lists(st.integers(0, 1 << 30), max_size=20).map(
    lambda numbers: [number % (node + 1) - 1 for node, number in enumerate(numbers)]
)


def path_to(parents, node):
    return [] if node < 0 else [*path_to(parents, parents[node]), node]


def ordinary(case, parents):
    """Each node's output, and the states after a few paths, from the plain operator along each path."""
    ends = {-1, len(parents) - 1, (len(parents) - 1) // 2}

    def run(leaves):
        last = {name: x for name, x in leaves.items() if name.startswith("state")}
        outputs, states = [leaves["v"][:, :0]], []
        for node in range(-1, len(parents)):
            along = case.cut(leaves, path_to(parents, node), tuple(last.values()))
            o, state = case.call(along, backend="reference")
            outputs.append(o[:, -1:])
            states += [state] if node in ends else []
        return torch.cat(outputs, 1), states

    return run


def over_tree(case, parents, **options):
    ends = {-1, len(parents) - 1, (len(parents) - 1) // 2}

    def run(leaves):
        o, records = case.call(leaves, parents=torch.tensor(parents, dtype=torch.long), **options)
        return o, [commit(records, path_to(parents, node)) for node in sorted(ends)]

    return run


def measure(run, leaves, dtype=torch.float64):
    return with_gradients(lambda *values: run(dict(zip(leaves, values, strict=True))), list(leaves.values()), dtype)


@every_memory
@settings(max_examples=12, deadline=None)
@given(parents=trees)
def test_every_node_ends_a_sequence(case, parents):
    leaves = case.leaves(2, len(parents))
    expected = measure(ordinary(case, parents), leaves)
    for way in WAYS:
        run = over_tree(case, parents, **way)
        assert_close(measure(run, leaves), expected, 1e-10, case.floor)
        assert_close(measure(run, leaves, torch.float32), expected, 1e-5, case.floor)


@every_memory
@pytest.mark.parametrize("name", ADVERSARIES)
def test_decays_of_any_strength(case, name):
    leaves = case.leaves(2, len(BUSHY))
    if "log_decay" not in leaves:
        return
    leaves["log_decay"] = ADVERSARIES[name](leaves["log_decay"]).float().double()
    expected = measure(ordinary(case, BUSHY), leaves)
    for way in WAYS:
        run = over_tree(case, BUSHY, **way)
        assert_close(measure(run, leaves), expected, 1e-10, case.floor)
        assert_close(measure(run, leaves, torch.float32), expected, 1e-5, case.floor)


@every_memory
def test_bfloat16(case):
    leaves = {name: x.bfloat16().double() for name, x in case.leaves(2, len(BUSHY)).items()}
    expected = measure(ordinary(case, BUSHY), leaves)
    for way in WAYS:
        found = measure(over_tree(case, BUSHY, **way), leaves, torch.bfloat16)
        o, *states = found[: -len(leaves)]
        assert o.dtype == torch.bfloat16
        assert all(x.dtype == torch.float32 for x in states)
        assert_close(found[: -len(leaves)], expected[: -len(leaves)], 1e-2, case.floor)
        assert_close(found, expected, 2e-2, case.floor)  # as MemoryLaws: cotangents and gradients are rounded as well


@every_memory
@pytest.mark.parametrize("length", [0, 1, 130])
def test_a_chain_is_a_sequence(case, length):
    leaves, chain = case.leaves(2, length), [*range(-1, length - 1)]

    def plain(leaves):
        return case.call(leaves)

    def branch(leaves):
        o, records = case.call(leaves, parents=torch.tensor(chain, dtype=torch.long))
        return o, commit(records, range(length))

    expected = measure(plain, leaves)
    assert_close(measure(branch, leaves), expected, 1e-10, case.floor)
    assert_close(measure(branch, leaves, torch.float32), expected, 1e-5, case.floor)


@every_memory
def test_generation_from_a_committed_state(case):
    """Verify a tree, keep a path, go on with another tree: as if the kept tokens had come one by one."""
    leaves, path = case.leaves(2, len(BUSHY)), [0, 1, 3, 8]
    for way in WAYS:
        _, records = case.call(leaves, parents=torch.tensor(BUSHY), **way)
        state = commit(records, torch.tensor(path))
        state = state if isinstance(state, tuple) else (state,)
        o, _ = case.call(case.cut(leaves, slice(None), state), parents=torch.tensor(BUSHY), **way)
        for node in (0, 9, 13):
            both = path + path_to(BUSHY, node)
            whole = {name: x for name, x in leaves.items() if name.startswith("state")}
            expected, _ = case.call(case.cut(leaves, both, tuple(whole.values())), backend="reference")
            assert rms(o[:, node], expected[:, -1]) < 1e-11


@every_memory
def test_rows_take_their_own_paths(case):
    leaves = case.leaves(3, len(BUSHY))
    _, records = case.call(leaves, parents=torch.tensor(BUSHY))
    paths = [[0, 2, 5], [], [6]]
    found = torch.utils._pytree.tree_leaves(commit(records, paths))
    together = [torch.utils._pytree.tree_leaves(commit(records, path)) for path in paths]
    for part, several in zip(found, zip(*together, strict=True), strict=True):
        assert_close([part], [torch.cat([x[b : b + 1] for b, x in enumerate(several)])], 1e-14)
    with pytest.raises(ValueError, match="one `path` for all rows, or one for each of the 3: got 2 paths"):
        commit(records, paths[:2])


@every_memory
@pytest.mark.parametrize("other", [1e3, math.inf, math.nan])
@pytest.mark.parametrize("form", ["auto", "recurrent"])
def test_other_branches_are_out_of_reach(case, other, form):
    """To the bit, whatever stands there; what a changed node gives, and its descendants, does change."""
    leaves = {name: x.float() for name, x in case.leaves(2, len(BUSHY)).items()}
    call = functools.partial(case.call, parents=torch.tensor(BUSHY), form=form)
    before, records = call(leaves)
    for changed in (1, 6, 13):
        spoilt = {name: x.clone() for name, x in leaves.items()}
        for name in case.tokens:
            spoilt[name][:, changed] = torch.randn_like(spoilt[name][:, changed]) * other
        after, spoilt_records = call(spoilt)
        for node in range(len(BUSHY)):
            assert torch.equal(after[:, node], before[:, node]) == (changed not in path_to(BUSHY, node))
        path = path_to(BUSHY, 5)
        pairs = zip(*(torch.utils._pytree.tree_leaves(commit(r, path)) for r in (records, spoilt_records)), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


@every_memory
def test_records_are_no_larger_than_the_inputs(case):
    leaves = case.leaves(2, 20)
    _, records = case.call(leaves, parents=torch.arange(-1, 19))
    count = sum(x.numel() for x in torch.utils._pytree.tree_leaves(records) if x is not None)
    # One more vector of values a token, and with a normaliser a one beside each.
    assert count <= sum(x.numel() for x in leaves.values()) + 20 + leaves["v"].numel() + leaves["v"][..., 0].numel()


@every_memory
def test_inputs_stay_and_the_state_may_be_missing(case):
    leaves = case.leaves(2, len(BUSHY))
    copies = {name: x.clone() for name, x in leaves.items()}
    zeros = case.cut(leaves, slice(None), tuple(torch.zeros_like(leaves[n]) for n in leaves if n[:5] == "state"))
    for way in WAYS:
        (o, records), (other, alike) = (
            case.call(one, parents=torch.tensor(BUSHY), **way) for one in (zeros, case.cut(leaves, slice(None), ()))
        )
        assert torch.equal(o, other)
        for path in ([], [0, 1]):
            pairs = zip(*(torch.utils._pytree.tree_leaves(commit(r, path)) for r in (records, alike)), strict=True)
            assert all(torch.equal(*pair) for pair in pairs)
    assert all(torch.equal(leaves[name], copies[name]) for name in leaves)


@every_memory
def test_autocast_leaves_float32_alone(case):
    leaves = {name: x.float() for name, x in case.leaves(2, len(BUSHY)).items()}

    def run(leaves):
        with torch.autocast("cpu", torch.bfloat16):
            return over_tree(case, BUSHY)(leaves)

    expected = measure(over_tree(case, BUSHY), leaves, torch.float32)
    assert_close(measure(run, leaves, torch.float32), expected, 1e-6, case.floor)


@every_memory
@pytest.mark.parametrize("form", ["auto", "recurrent"])
def test_gradcheck(case, form):
    parents = [-1, 0, 0, 1, 2]
    leaves = {name: x.requires_grad_() for name, x in case.leaves(1, len(parents)).items()}

    def run(*values):
        results = over_tree(case, parents, form=form)(dict(zip(leaves, values, strict=True)))
        return torch.utils._pytree.tree_leaves(results)

    values = list(leaves.values())
    assert torch.autograd.gradcheck(run, values, eps=1e-6, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, values, eps=1e-6, atol=1e-4, fast_mode=True)


COMPILED = """
import warnings
import torch
from everlong.ops import causal_conv1d, commit, delta_rule, softmax_attention

def run(q, beta, parents):
    y, inputs = causal_conv1d(q[:, :, 0], q[0, :4, 0].mT, parents=parents)
    o, records = delta_rule(q + 1, q, y[:, :, None] * q, beta, parents=parents)
    return softmax_attention(q, q, o, parents=parents), commit(inputs, [0, 1]), commit(records, [0, 1])

warnings.simplefilter("error")
compiled = torch.compile(run, backend="eager")
for parents in ([-1, 0, 0, 1], [-1, 0, 1, 2, 0, 3]):
    q, beta, parents = torch.randn(1, len(parents), 2, 5), torch.rand(1, len(parents), 2), torch.tensor(parents)
    for one, other in zip(compiled(q, beta, parents), run(q, beta, parents), strict=True):
        torch.testing.assert_close(one, other)
"""


def test_compiled_callers_get_the_same_without_warnings():
    """In a process that does not check shapes as it goes."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def convolution(parents, taps, batch=2, width=3):
    inputs = normal(batch, len(parents), width), normal(width, taps), normal(width), normal(batch, taps - 1, width)
    leaves = dict(zip(("x", "weight", "bias", "state"), (x.double() for x in inputs), strict=True))
    ends = (-1, len(parents) - 1)

    def run(leaves, **options):
        y, records = causal_conv1d(**leaves, parents=torch.tensor(parents, dtype=torch.long), **options)
        return y, [commit(records, path_to(parents, end)) for end in ends]

    def along(leaves, **options):
        outputs, states = [leaves["x"][:, :0]], []
        for node in range(-1, len(parents)):
            path = path_to(parents, node)
            y, state = causal_conv1d(**(leaves | {"x": leaves["x"][:, path]}), backend="reference", **options)
            outputs.append(y[:, -1:])
            states += [state] * ends.count(node)
        return torch.cat(outputs, 1), states

    return leaves, run, along


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("taps", [1, 2, 4, 9])
@settings(max_examples=12, deadline=None)
@given(parents=trees)
def test_convolution_of_each_path(parents, taps, activation):
    leaves, run, along = convolution(parents, taps)
    expected = measure(functools.partial(along, activation=activation), leaves)
    for backend in ("torch", "reference"):
        one = functools.partial(run, backend=backend, activation=activation)
        assert_close(measure(one, leaves), expected, 1e-12)
        assert_close(measure(one, leaves, torch.float32), expected, 1e-5)


@pytest.mark.parametrize("taps", [1, 4])
def test_convolution_in_bfloat16(taps):
    leaves, run, along = convolution(BUSHY, taps)
    leaves = {name: x.bfloat16().double() for name, x in leaves.items()}
    expected = measure(along, leaves)
    for backend in ("torch", "reference"):
        found = measure(functools.partial(run, backend=backend), leaves, torch.bfloat16)
        assert [x.dtype for x in found[:3]] == [torch.bfloat16, torch.float32, torch.float32]
        assert_close(found, expected, 1e-2)


def test_convolution_alone_and_for_rows():
    x, weight = normal(2, len(BUSHY), 3), normal(3, 4)
    y, records = causal_conv1d(x, weight, parents=torch.tensor(BUSHY))
    along, state = causal_conv1d(x[:, [0, 1, 4]], weight)
    assert rms(y[:, 4], along[:, -1]) < 1e-6
    assert torch.equal(commit(records, [0, 1, 4]), state)
    both = commit(records, [[0, 1, 4], []])
    assert torch.equal(both, torch.stack([state[0], torch.zeros(3, 3)]))
    for other in (1e3, math.inf, math.nan):
        x[:, 1] = other
        after, _ = causal_conv1d(x, weight, parents=torch.tensor(BUSHY))
        for node in range(len(BUSHY)):
            assert torch.equal(after[:, node], y[:, node]) == (1 not in path_to(BUSHY, node)[-4:])


def distances(queries, keys):
    return -0.3 * (queries[:, None] - keys).abs()[None] * torch.arange(1.0, 5.0)[:, None, None]


@pytest.mark.parametrize("form", ["auto", "parallel", "chunk", "recurrent"])
@settings(max_examples=8, deadline=None)
@given(
    parents=trees.filter(len),
    prefix=st.integers(0, 6),
    window=st.none() | st.integers(1, 9),
    kind=st.sampled_from("-fb"),
)
def test_attention_of_each_path(form, parents, prefix, window, kind):
    """o and lse of a node are those of the last query behind its own path's keys."""
    T, S = len(parents), prefix + len(parents)
    q, k, v = (normal(2, *shape).double() for shape in ((T, 4, 5), (S, 2, 5), (S, 2, 3)))
    table = normal(4, T, S).double()

    def run(q, k, v, table, **options):
        bias = {"-": None, "f": distances, "b": table}[kind]
        return softmax_attention(
            q,
            k,
            v,
            parents=torch.tensor(parents, dtype=torch.long),
            bias=bias,
            window=window,
            return_lse=True,
            **options,
        )

    def along(q, k, v, table):
        rows = [softmax_attention(q[:, :0], k, v, return_lse=True)]
        for node in range(T):
            keys = [*range(prefix), *(prefix + one for one in path_to(parents, node))]
            bias = {"-": None, "f": distances, "b": table[:, node, None, keys]}[kind]
            here = q[:, node, None], k[:, keys], v[:, keys]
            rows.append(softmax_attention(*here, window=window, bias=bias, return_lse=True, backend="reference"))
        return tuple(torch.cat(part, 1) for part in zip(*rows, strict=True))

    leaves = [q, k, v, table]
    expected = with_gradients(along, leaves)
    for options in ({"backend": "reference"}, {"form": form}):
        one = functools.partial(run, **options)
        assert_close(with_gradients(one, leaves), expected, 1e-10, 1e-3)
        assert_close(with_gradients(one, leaves, torch.float32), expected, 1e-5, 1e-3)
    rounded, options = [x.bfloat16().double() for x in leaves[:3]], {"parents": torch.tensor(parents), "window": window}
    o = softmax_attention(*(x.bfloat16() for x in rounded), form=form, **options)
    assert_close([o], [softmax_attention(*rounded, backend="reference", **options)], 1e-2)


def test_attention_with_rows_of_different_lengths():
    """Each row's tree stands at the end of its own real keys, whatever is behind these."""
    parents, lengths = torch.tensor([-1, 0, 0, 2]), [4, 9, 6]
    q, k, v = normal(3, 4, 4, 5), normal(3, 9, 2, 5), normal(3, 9, 2, 3)
    mask = torch.rand(3, 1, 4, 9) < 0.8
    for row, length in enumerate(lengths):
        k[row, length:] = v[row, length:] = math.nan
    for options in ({}, {"window": 3}, {"bias": distances}, {"mask": mask}, {"bias": distances, "mask": mask[:1]}):
        for backend in ("torch", "reference"):
            o = softmax_attention(
                q, k, v, parents=parents, key_lengths=torch.tensor(lengths), backend=backend, **options
            )
            for row, length in enumerate(lengths):
                own = {name: x[-1:] if name == "mask" and len(x) == 1 else x for name, x in options.items()}
                if "mask" in own:
                    own["mask"] = own["mask"][row if len(own["mask"]) > 1 else 0][None, ..., :length]
                alone = [q[row, None], k[row, None, :length], v[row, None, :length]]
                expected = softmax_attention(*alone, parents=parents, backend="reference", **own)
                assert rms(o[row, None], expected) < 1e-6


def test_a_chain_of_queries_is_plain_attention():
    q, k, v = normal(2, 9, 4, 5), normal(2, 30, 2, 5), normal(2, 30, 2, 3)
    for options in ({}, {"window": 5}, {"bias": distances}):
        found = softmax_attention(q, k, v, parents=torch.arange(-1, 8), **options)
        assert rms(found, softmax_attention(q, k, v, **options)) < 1e-6
        assert softmax_attention(q[:, :0], k, v, parents=torch.arange(0), **options).shape == (2, 0, 4, 3)


def test_attention_does_not_reach_other_branches():
    q, k, v = (normal(2, len(BUSHY), 2, 5) for _ in range(3))
    before = softmax_attention(q, k, v, parents=torch.tensor(BUSHY))
    q[:, 1], k[:, 1], v[:, 1] = (1e3 * normal(2, 2, 5) for _ in range(3))
    after = softmax_attention(q, k, v, parents=torch.tensor(BUSHY, dtype=torch.int32))
    for node in range(len(BUSHY)):
        assert torch.equal(after[:, node], before[:, node]) == (1 not in path_to(BUSHY, node))


def test_the_cache_keeps_the_path():
    """Keys and values at the committed indices are those of the ordinary sequence: the next token reads the same."""
    prefix, path = 5, [0, 2, 5]
    k, v, q = normal(1, prefix + len(BUSHY), 2, 5), normal(1, prefix + len(BUSHY), 2, 3), normal(1, 1, 2, 5)
    keep = commit(KeyRecords(torch.tensor(BUSHY), prefix), path)
    assert keep.tolist() == [0, 1, 2, 3, 4, 5, 7, 10]
    o = softmax_attention(q, k[:, keep], v[:, keep])
    seen = torch.zeros(1, 1, 1, prefix + len(BUSHY), dtype=torch.bool)
    seen[..., keep] = True
    assert rms(o, softmax_attention(q, k, v, causal=False, mask=seen)) < 1e-6
    assert commit(KeyRecords(torch.tensor(BUSHY), 0), path).tolist() == path
    assert commit(KeyRecords(torch.tensor(BUSHY), 2), []).tolist() == [0, 1]
    with pytest.raises(ValueError, match="`KeyRecords` take one path at a time"):
        commit(KeyRecords(torch.tensor(BUSHY), 2), [[0], [6]])


def test_depths():
    tree = Tree.of(torch.tensor(BUSHY), torch.zeros(1, len(BUSHY)))
    assert tree.depth.tolist() == [len(path_to(BUSHY, node)) - 1 for node in range(len(BUSHY))]
    for node, other in itertools.product(range(len(BUSHY)), repeat=2):
        assert tree.visible[node, other] == (other in path_to(BUSHY, node))


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([-1, 1, 0], r"`parents` come before their children, and -1 is the root: got parents\[1\] = 1"),
        ([-1, 0, 2], r"got parents\[2\] = 2"),
        ([0, -1, -1], r"got parents\[0\] = 0"),
        ([-1, -2, 0], r"got parents\[1\] = -2"),
    ],
)
def test_parents_that_are_no_tree(parents, message):
    parents = torch.tensor(parents)
    q, x = normal(1, 3, 2, 4), normal(1, 3, 2)
    for call in (
        *(functools.partial(case.call, case.leaves(1, 3)) for case in MEMORIES),
        functools.partial(causal_conv1d, x, normal(2, 4)),
        functools.partial(softmax_attention, q, q, q),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call(parents=parents)
        assert "\n" not in str(error.value)


def test_what_does_not_go_with_a_tree():
    q, parents, bounds = normal(1, 3, 2, 4), torch.tensor([-1, 0, 0]), torch.tensor([0, 1, 3])
    refused = "`parents` and `cu_seqlens` exclude each other: the rows of a batch share one tree"
    for case in MEMORIES:
        with pytest.raises(ValueError, match=refused):
            case.call(case.leaves(1, 3, 2), parents=parents, cu_seqlens=bounds)
    for call in (
        functools.partial(softmax_attention, q, q, q),
        functools.partial(causal_conv1d, q[:, :, 0], normal(4, 2)),
    ):
        with pytest.raises(ValueError, match=refused):
            call(parents=parents, cu_seqlens=bounds)
    for operator in (linear_attention, softmax_attention):
        with pytest.raises(ValueError, match="`parents` give an order of tokens: got causal=False"):
            operator(q, q, q, parents=parents, causal=False)
    with pytest.raises(ValueError, match="the keys of the tree's 3 nodes are the last ones: got 2 keys in a row"):
        softmax_attention(q, q[:, :2], q[:, :2], parents=parents)
    with pytest.raises(ValueError, match="the keys of the tree's 3 nodes are the last ones: got 1 keys in a row"):
        softmax_attention(q, q, q, parents=parents, key_lengths=torch.tensor([1]))
    for wrong in (parents[:2], parents[None], parents.short()):
        with pytest.raises(ValueError, match=r"`parents` holds an integer a token, \[3\]: got torch.int"):
            Tree.of(wrong, q)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([1], r"got \[1\], where -1 comes before 1, whose parent is 0"),
        ([0, 3], r"where 0 comes before 3, whose parent is 1"),
        ([0, 0], "where 0 comes before 0, whose parent is -1"),
        ([0, 6], "where 0 comes before 6, whose parent is -1"),
        ([0, 14], r"`path` holds nodes of the tree, 0 to 13: got \[0, 14\]"),
        ([-1, 0], r"`path` holds nodes of the tree, 0 to 13: got \[-1, 0\]"),
    ],
)
def test_paths_that_are_no_chain(path, message):
    records = [case.call(case.leaves(1, len(BUSHY)), parents=torch.tensor(BUSHY))[1] for case in MEMORIES]
    records.append(causal_conv1d(normal(1, len(BUSHY), 2), normal(2, 4), parents=torch.tensor(BUSHY))[1])
    records.append(KeyRecords(torch.tensor(BUSHY), 3))
    for one, nodes in itertools.product(records, (path, torch.tensor(path))):
        with pytest.raises(ValueError, match=message) as error:
            commit(one, nodes)
        assert "\n" not in str(error.value)
