"""The laws that every operator with a matrix state keeps. A test file offers its cases as the fixture `case`."""

import functools
import itertools
import math
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import rms, with_gradients
from torch import Tensor

from everlong.ops import delta, recurrence

FORMS = ("parallel", "chunk", "recurrent")
LENGTHS = (0, 1, 2, 63, 65, 130)
PACKED = (0, 3, 0, 1, 40, 70, 2, 0)
H, K, V = 4, 5, 3


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def gates(*shape: int) -> Tensor:
    """Log-decays from nearly nothing to a strong decay."""
    return -(torch.rand(*shape) ** 4) * 3


ADVERSARIES: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing fades": torch.zeros_like,
    "everything fades": lambda g: torch.full_like(g, -1e4),
    "resets": lambda g: torch.full_like(g, -math.inf),
    "strong": lambda g: -20 * torch.rand_like(g),
    "mixed": lambda g: torch.tensor([0.0, -1e-4, -0.1, -3.0, -90.0, -1e4, -math.inf]).to(g)[torch.randint(7, g.shape)],
}


@dataclass(frozen=True)
class Case:
    """One operator with some of its options: what comes with every token, what does not, and the state's parts.

    Errors count relative to what is expected, or to `floor` where that is more: some gradients are exactly 0.
    """

    name: str
    operator: Callable[..., Any]
    tokens: dict[str, Callable[[int, int], Tensor]]
    constants: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    state: tuple[tuple[int, ...], ...] = ((H, K, V),)
    floor: float = 0.0

    def __str__(self) -> str:
        return self.name

    def leaves(self, batch: int, length: int, sequences: int | None = None) -> dict[str, Tensor]:
        """Everything that has a gradient, in float64, but exact in float32."""
        made = {name: make(batch, length) for name, make in self.tokens.items()}
        made |= {name: make() for name, make in self.constants.items()}
        made |= {f"state{i}": normal(sequences or batch, *shape).abs() for i, shape in enumerate(self.state)}
        return {name: x.double() for name, x in made.items()}

    def call(self, leaves: dict[str, Tensor], **options: Any) -> Any:
        states = tuple(x for name, x in leaves.items() if name.startswith("state"))
        rest = {name: x for name, x in leaves.items() if not name.startswith("state")}
        if states:
            options["initial_state"] = states[0] if len(states) == 1 else states
        return self.operator(**rest, **self.options, **options)

    def measure(self, leaves: dict[str, Tensor], dtype: torch.dtype = torch.float64, **options: Any) -> list[Tensor]:
        """Results and gradients, computed in `dtype`."""
        run = lambda *values: self.call(dict(zip(leaves, values, strict=True)), **options)  # noqa: E731
        return with_gradients(run, list(leaves.values()), dtype)

    def cut(self, leaves: dict[str, Tensor], time: slice, states: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The same at some of the tokens, from other states."""
        kept = {name: x[:, time] if name in self.tokens else x for name, x in leaves.items() if name[:5] != "state"}
        return kept | {f"state{i}": x for i, x in enumerate(states)}


def parts(result: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    o, state = result
    return o, state if isinstance(state, tuple) else (state,)


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float, floor: float = 0.0) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == other.shape
        assert one.isfinite().all(), f"result {i} is not finite"
        assert rms(one, other, floor) <= tolerance, f"result {i}: {rms(one, other, floor):.1e}"


@pytest.fixture
def chunks_of(monkeypatch):
    def use(size: int) -> None:
        monkeypatch.setattr(recurrence, "CHUNK", size)
        monkeypatch.setattr(delta, "CHUNK", size)

    return use


class MemoryLaws:
    """To be inherited by a test class beside a fixture `case`."""

    @pytest.mark.parametrize("length", LENGTHS)
    def test_forms_agree(self, case, length):
        leaves = case.leaves(2, length)
        expected = case.measure(leaves, backend="reference")
        for form in FORMS:
            assert_close(case.measure(leaves, form=form), expected, 1e-10, case.floor)
            assert_close(case.measure(leaves, torch.float32, form=form), expected, 1e-5, case.floor)

    @pytest.mark.parametrize("size", [2, 16, 128])
    def test_size_of_chunks_makes_no_difference(self, case, size, chunks_of):
        leaves = case.leaves(1, 70)
        expected = case.measure(leaves, form="recurrent")
        chunks_of(size)
        assert_close(case.measure(leaves, form="chunk"), expected, 1e-10)

    def test_packed_is_separate(self, case, chunks_of):
        leaves = case.leaves(1, sum(PACKED), len(PACKED))
        bounds = torch.tensor([0, *itertools.accumulate(PACKED)])
        states = [x for name, x in leaves.items() if name.startswith("state")]

        def separately(*values):
            given = dict(zip(leaves, values, strict=True))
            outputs, last = [], []
            for n, (start, stop) in enumerate(itertools.pairwise(bounds.tolist())):
                own = tuple(x[n : n + 1] for x in values[-len(states) :])
                o, state = parts(case.call(case.cut(given, slice(start, stop), own), backend="reference"))
                outputs.append(o)
                last.append(state)
            return torch.cat(outputs, 1), tuple(torch.cat(part) for part in zip(*last, strict=True))

        expected = with_gradients(separately, list(leaves.values()))
        assert_close(case.measure(leaves, backend="reference", cu_seqlens=bounds), expected, 1e-12)
        for form in FORMS:
            assert_close(case.measure(leaves, form=form, cu_seqlens=bounds), expected, 1e-10)
        chunks_of(8)
        assert_close(case.measure(leaves, form="chunk", cu_seqlens=bounds.int()), expected, 1e-10)

    @pytest.mark.parametrize("form", [*FORMS, "auto"])
    def test_state_continues(self, case, form):
        leaves = case.leaves(2, 100)
        o, state = parts(case.call(leaves, form=form))
        for cut in (1, *torch.randint(2, 99, (2,)).tolist()):
            first, middle = parts(case.call(case.cut(leaves, slice(cut), self.states(leaves)), form=form))
            second, last = parts(case.call(case.cut(leaves, slice(cut, None), middle), form=form))
            assert rms(torch.cat([first, second], 1), o) < 1e-11
            assert all(rms(found, expected) < 1e-11 for found, expected in zip(last, state, strict=True))

    def states(self, leaves):
        return tuple(x for name, x in leaves.items() if name.startswith("state"))

    def test_no_state_is_a_state_of_zeros(self, case):
        leaves = case.leaves(2, 20)
        zeros = case.cut(leaves, slice(None), tuple(torch.zeros_like(x) for x in self.states(leaves)))
        none = case.cut(leaves, slice(None), ())
        for options in ({"backend": "reference"}, *({"form": form} for form in FORMS)):
            (o, state), (other, last) = parts(case.call(none, **options)), parts(case.call(zeros, **options))
            assert torch.equal(o, other)
            assert all(torch.equal(*pair) for pair in zip(state, last, strict=True))

    @pytest.mark.parametrize("name", ADVERSARIES)
    def test_decays_of_any_strength(self, case, name, chunks_of):
        leaves = case.leaves(1, 70)
        if "log_decay" not in leaves:
            return
        chunks_of(32)
        leaves["log_decay"] = ADVERSARIES[name](leaves["log_decay"]).float().double()
        expected = case.measure(leaves, backend="reference")
        for form in FORMS:
            assert_close(case.measure(leaves, form=form), expected, 1e-10, case.floor)
            assert_close(case.measure(leaves, torch.float32, form=form), expected, 1e-5, case.floor)

    @pytest.mark.parametrize("future", [1e3, math.inf, math.nan])
    @pytest.mark.parametrize("form", FORMS)
    def test_future_is_out_of_reach(self, case, form, future):
        leaves = {name: x.float() for name, x in case.leaves(2, 90).items()}
        bounds = torch.tensor([0, 30, 90])
        packed = case.cut(leaves, slice(None), self.states(leaves))
        packed = {name: x[:1] if name in case.tokens else x for name, x in packed.items()}
        for now in (1, 37, 64):
            for given, options in ((leaves, {}), (packed, {"cu_seqlens": bounds})):
                changed = {name: x.clone() for name, x in given.items()}
                for name in case.tokens:
                    changed[name][:, now:] = torch.randn_like(changed[name][:, now:]) * future
                before, _ = parts(case.call(given, form=form, **options))
                after, _ = parts(case.call(changed, form=form, **options))
                assert torch.equal(after[:, :now], before[:, :now])
                assert not torch.equal(after[:, now:], before[:, now:])

    def test_huge_values(self, case):
        leaves = case.leaves(1, 70)
        leaves["v"] *= 2.0**60
        expected = case.measure(leaves, form="recurrent")
        assert_close(case.measure(leaves, torch.float32), expected, 1e-5)

    def test_bfloat16(self, case):
        leaves = case.leaves(2, 130)
        leaves = {name: x.to(torch.bfloat16).double() for name, x in leaves.items()}
        expected = case.measure(leaves, backend="reference")
        given = {
            name: x.bfloat16() if name in case.tokens and name != "log_decay" else x.float()
            for name, x in leaves.items()
        }
        o, state = parts(case.call(given))
        assert o.dtype == torch.bfloat16
        assert all(x.dtype == torch.float32 for x in state)
        assert_close([o, *state], expected[: 1 + len(state)], 1e-2)
        assert_close(case.measure(leaves, torch.bfloat16), expected, 2e-2)

    def test_autocast_leaves_float32_alone(self, case):
        leaves = case.leaves(2, 40)

        def run(*values, form):
            with torch.autocast("cpu", torch.bfloat16):
                return case.call(dict(zip(leaves, values, strict=True)), form=form)

        for form in FORMS:
            expected = case.measure(leaves, torch.float32, form=form)
            found = with_gradients(functools.partial(run, form=form), list(leaves.values()), torch.float32)
            assert_close(found, expected, 1e-6, case.floor)

    def test_inputs_stay_and_may_be_views(self, case):
        leaves = case.leaves(2, 40)
        copies = {name: x.clone() for name, x in leaves.items()}
        strided = {name: torch.stack([x, x], -1)[..., 0] for name, x in leaves.items()}
        for form in FORMS:
            (o, state), (other, last) = parts(case.call(leaves, form=form)), parts(case.call(strided, form=form))
            assert torch.equal(o, other)
            assert all(torch.equal(*pair) for pair in zip(state, last, strict=True))
            assert all(torch.equal(leaves[name], copies[name]) for name in leaves)

    def test_sequences_are_independent(self, case):
        leaves = case.leaves(3, 40)
        o, _ = parts(case.call(leaves))
        shared = {name: x[1:2] if name in case.tokens or name[:5] == "state" else x for name, x in leaves.items()}
        alone, _ = parts(case.call(shared))
        assert rms(alone, o[1:2]) < 1e-14

    @pytest.mark.parametrize("form", FORMS)
    def test_gradcheck(self, case, form, chunks_of):
        chunks_of(4)
        leaves = {name: x.requires_grad_() for name, x in case.leaves(1, 6).items()}

        def run(*values):
            o, state = parts(case.call(dict(zip(leaves, values, strict=True)), form=form))
            return o, *state

        assert torch.autograd.gradcheck(run, list(leaves.values()), eps=1e-6, fast_mode=True)


def compile_all(test_file: str) -> None:
    """Compiles every case of a test file, warnings as errors, in a process that does not check shapes as it goes."""
    tests = Path(__file__).parent
    command = [sys.executable, str(Path(__file__)), test_file]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}"})


def _compile_cases(test_file: str) -> None:
    torch.manual_seed(0)
    warnings.simplefilter("error")
    for case in runpy.run_path(test_file)["CASES"]:
        torch.compiler.reset()
        compiled = torch.compile(case.call, backend="aot_eager")
        for length, bounds in ((40, None), (50, None), (50, [0, 20, 20, 50])):
            leaves = case.leaves(1, length, bounds and len(bounds) - 1)
            options = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}

            def run(*values, leaves=leaves, options=options, compiled=compiled):
                return compiled(dict(zip(leaves, values, strict=True)), **options)

            found = with_gradients(run, list(leaves.values()), torch.float32)
            assert_close(found, case.measure(leaves, torch.float32, **options), 1e-6)


if __name__ == "__main__":
    _compile_cases(sys.argv[1])
