"""What `bench ops` counts, lists and draws; that its peers compute what ours do. No time is asserted."""

import math
import sys
import xml.etree.ElementTree as ET

import pytest
import torch
from oracles import fla, rms

from everlong.lab.bench import cases, ops, ops_lengths, ops_memory, ops_speed, peers, train
from everlong.lab.bench.cases import CASES, DELTA, SELECTIVE, Shape, inputs
from everlong.lab.bench.result import Row, draw, store
from everlong.lab.bench.turns import forward_backward, in_turns, ratio
from everlong.ops.dispatch import TABLE, Implementation

SVG = "{http://www.w3.org/2000/svg}"


def test_every_operator_of_the_table_is_measured():
    assert {case.operator for case in CASES.values()} == set(TABLE)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_case_runs_forward_and_backward(name, dtype):
    shape = Shape(70, heads=2, size=16, dtype=dtype)
    given = inputs(CASES[name].names, shape)
    gradients = forward_backward(CASES[name].on("auto"), given)()
    assert [g.shape for g in gradients] == [x.shape for x in given]
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)


def test_rows_of_native_kernels_come_from_the_table(monkeypatch):
    without = {name: tuple(x for x in found if x.backend != "native") for name, found in TABLE.items()}
    monkeypatch.setattr(cases, "TABLE", without)
    assert not cases.native()
    native = Implementation("native", "nowhere:nothing")
    monkeypatch.setattr(Implementation, "missing", lambda self, *, build: None)
    monkeypatch.setattr(cases, "TABLE", {**without, "delta_rule": (native, *without["delta_rule"])})
    assert {case.operator for case in cases.native().values()} == {"delta_rule"}
    rows = [measure for measure in ops_speed.measures() if "torch backend" in measure]
    assert len(rows) == 2 * len(cases.native())  # two lengths
    monkeypatch.setattr(Implementation, "missing", lambda self, *, build: "no compiler")
    assert not cases.native()


def test_the_count_is_that_of_four_products_a_chunk():
    assert ops_speed.flops(1, 1, 64) == 32_768
    assert ops_speed.flops(1, 1, 128) == 131_072
    assert ops_speed.flops(4096, 8, 64) == 4096 * 8 * 32_768


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({64: 0.5, 128: 1.5, 256: 2.0}, 128),
        ({64: 1.5, 128: 0.9, 256: 2.0}, 256),  # faster by chance at one length is not faster from there on
        ({64: 1.5, 128: 1.2}, 64),
        ({64: 0.5, 128: 1.0}, sys.float_info.max),
    ],
)
def test_the_crossover_is_where_ours_stays_faster(ratios, expected):
    assert ops_speed.crossover(ratios) == expected


@pytest.mark.parametrize("theirs", [peers.sequential_scan, peers.associative_scan])
@pytest.mark.parametrize("length", [1, 2, 3, 37, 64])
def test_scans_written_in_torch_are_the_selective_scan(theirs, length):
    given = inputs(CASES[SELECTIVE].names, Shape(length, batch=2, heads=1, size=8))
    assert rms(theirs(*given), CASES[SELECTIVE].on("reference")(*given)) < 1e-5


def test_the_chunks_of_fla_are_the_gated_delta_rule():
    fla("fla/ops/gated_delta_rule/naive.py")
    given = inputs(CASES[DELTA].names, Shape(150, heads=2, size=16))
    assert rms(peers.fla_gated_delta(*given), CASES[DELTA].on("reference")(*given)) < 1e-5


def test_the_peer_of_attention_is_the_same_attention():
    q, k, v = peers.sdpa_inputs(50, heads=2, size=16)
    ours = CASES["softmax_attention"].on("reference")(*(x.transpose(1, 2) for x in (q, k, v)))
    assert rms(peers.sdpa(q, k, v).transpose(1, 2), ours) < 1e-5


def test_sides_take_turns():
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    times = in_turns(sides, seconds=0.0, least=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert ratio({"a": [4.0, 1.0, 2.0], "b": [1.0]}, "a", "b") == 2.0


def test_the_most_memory_holds_at_least_what_there_must_be():
    if not ops_memory.STATUS.exists():
        pytest.skip("only Linux tells a process the most memory that it has had")
    grown, must = ops_memory.growth("linear_scan", 2048)
    assert must == 6 * 2048 * 512 * 4  # gates, x, h, and the gradients of all three
    assert grown >= 0
    assert ops_memory.resident("VmHWM") >= ops_memory.resident("VmRSS")


def test_names_of_measures_survive_the_compiler():
    # torch.compile writes the word after `--only` into the code that it makes, between apostrophes.
    for suite in (ops, train):
        with pytest.raises(ValueError, match="no measure contains") as error:
            next(suite.rows("\0"))
        assert "'" not in str(error.value)


def test_the_exponent_is_that_of_the_end():
    assert ops_lengths.exponent({256: 1.0, 512: 1.0, 1024: 3.0, 2048: 4.0}) == 1.0
    assert ops_lengths.exponent({1: 9.0, 256: 1.0, 512: 2.0, 1024: 16.0}) == 2.0


def test_times_against_length_are_drawn_beside_the_stored_result(tmp_path):
    assert ops.picture([Row("something else", 1.0).as_dict()]) is None
    names = ops_lengths.measures()
    times = {str(length): 0.01 * length for length in ops_lengths.LENGTHS}
    path = store("ops", [Row(measure, 1.0, raw={"ms": times}) for measure in names], tmp_path)
    drawn = draw(path, ops.picture)
    assert drawn == tmp_path / "ops.svg"
    lines = list(ET.parse(drawn).getroot().iter(f"{SVG}polyline"))
    assert len(lines) == len(names) + 1  # torch's attention stands in both panels
    for line in lines:  # equal ratios of both axes: a straight line
        (x0, y0), *_, (xm, ym), (x1, y1) = (tuple(map(float, p.split(","))) for p in line.get("points").split()[::4])
        assert math.isclose((x1 - xm) / (xm - x0), (y1 - ym) / (ym - y0), rel_tol=0.01)
