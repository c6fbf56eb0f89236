"""How far the operators with a matrix state are from an independent implementation: outputs, states, all gradients.

The other implementation is flash-linear-attention's, its naive loops, which compute in float32 and need neither Triton
nor a GPU when each file is loaded by its path. `python -m everlong.lab.bench.errors` prints the table.
"""

import importlib.metadata
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from everlong import ops
from everlong.lab.bench.cases import has_kernels

Inputs = dict[str, Tensor]
Result = tuple[Tensor, Tensor | None]

BATCH, HEADS, KEYS, VALUES = 2, 3, 24, 40
FORMS = ("parallel", "chunk", "recurrent")
LENGTHS = (1, 63, 131)
PACKED = (65, 1, 130)


def naive(path: str) -> ModuleType:
    """The module at `path` in the installed fla-core, such as "fla/ops/gla/naive.py", without importing fla.

    Raises:
        ValueError: it is not installed.
    """
    try:
        place = importlib.metadata.distribution("fla-core").locate_file(path)
        importlib.metadata.distribution("einops")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install --no-deps fla-core einops") from None
    spec = importlib.util.spec_from_file_location(path.removesuffix(".py").replace("/", "_"), str(place))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Oracle(NamedTuple):
    """One function of theirs, and the operator of ours that it should agree with."""

    operator: str
    name: str
    decay: str | None  # None, "head", "token" or "channel"
    theirs: Callable[[Inputs, Tensor | None], Result]
    extra: tuple[str, ...] = ()
    takes_state: bool = True
    normalize: bool = False

    def ours(
        self,
        inputs: Inputs,
        state: Tensor | None,
        form: str,
        cu_seqlens: Tensor | None = None,
        backend: str = "torch",
    ) -> Result:
        """Ours on the same inputs."""
        operator = getattr(ops, self.operator)
        rest = [inputs[name] for name in ("beta", "a", "b") if name in inputs]
        options: dict[str, Tensor | bool] = {name: inputs[name] for name in ("log_decay", "bonus") if name in inputs}
        if self.normalize:
            options["normalize"] = True
        o, last = operator(
            inputs["q"],
            inputs["k"],
            inputs["v"],
            *rest,
            **options,
            initial_state=state,
            cu_seqlens=cu_seqlens,
            form=form,
            backend=backend,
        )
        return o, last if self.takes_state else None


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """`[B, T, H, ...]` -> `[B, H, T, ...]`"""
    return [x.transpose(1, 2) for x in tensors]


def _retention(x: Inputs, state: Tensor | None) -> Result:
    o = naive("fla/ops/retention/naive.py").naive_retention(*heads_first(x["q"], x["k"], x["v"]))
    return o.transpose(1, 2), None


def _linear(x: Inputs, state: Tensor | None) -> Result:
    run = naive("fla/ops/linear_attn/naive.py").naive_recurrent_linear_attn
    result: Result = run(x["q"], x["k"], x["v"], None, state, output_final_state=True)
    return result


def _normalized(x: Inputs, state: Tensor | None) -> Result:
    o, _ = naive("fla/ops/linear_attn/naive.py").naive_recurrent_linear_attn(x["q"], x["k"], x["v"], normalize=True)
    return o, None


def _simple_gla(x: Inputs, state: Tensor | None) -> Result:
    run = naive("fla/ops/simple_gla/naive.py").naive_recurrent_simple_gla
    result: Result = run(x["q"], x["k"], x["v"], x["log_decay"], initial_state=state)
    return result


def _gla(x: Inputs, state: Tensor | None) -> Result:
    run = naive("fla/ops/gla/naive.py").naive_recurrent_gla
    result: Result = run(x["q"], x["k"], x["v"], x["log_decay"], state, output_final_state=True)
    return result


def _rwkv6(x: Inputs, state: Tensor | None) -> Result:
    run = naive("fla/ops/rwkv6/recurrent_naive.py").naive_recurrent_rwkv6
    tokens = heads_first(x["q"], x["k"], x["v"], x["log_decay"])
    o, state = run(*tokens, x["bonus"], initial_state=state, output_final_state=True)
    return o.transpose(1, 2), state


def _delta(x: Inputs, state: Tensor | None) -> Result:
    run = naive("fla/ops/delta_rule/naive.py").delta_rule_recurrence
    o, state = run(*heads_first(x["q"], x["k"], x["v"], x["beta"]), initial_state=state)
    return o.transpose(1, 2), state


def _gated_delta(x: Inputs, state: Tensor | None) -> Result:
    run = naive("fla/ops/gated_delta_rule/naive.py").naive_recurrent_gated_delta_rule
    tokens = {"q": x["q"], "k": x["k"], "v": x["v"], "beta": x["beta"], "g": x["log_decay"]}
    result: Result = run(**tokens, initial_state=state, output_final_state=True)
    return result


def _kda(x: Inputs, state: Tensor | None) -> Result:
    run = naive("fla/ops/kda/naive.py").naive_recurrent_kda
    result: Result = run(
        x["q"], x["k"], x["v"], x["log_decay"], x["beta"], initial_state=state, output_final_state=True
    )
    return result


def _dplr(x: Inputs, state: Tensor | None) -> Result:
    run = naive("fla/ops/generalized_delta_rule/dplr/naive.py").dplr_recurrence
    o, state = run(*heads_first(*(x[name] for name in ("q", "k", "v", "a", "b", "log_decay"))), initial_state=state)
    return o.transpose(1, 2), state


ORACLES = (
    Oracle("linear_attention", "retention", "head", _retention, takes_state=False),
    Oracle("linear_attention", "linear_attn", None, _linear),
    Oracle("linear_attention", "linear_attn /z", None, _normalized, takes_state=False, normalize=True),
    Oracle("linear_attention", "simple_gla", "token", _simple_gla),
    Oracle("linear_attention", "gla", "channel", _gla),
    Oracle("linear_attention", "rwkv6", "channel", _rwkv6, ("bonus",)),
    Oracle("delta_rule", "delta_rule", None, _delta, ("beta",)),
    Oracle("delta_rule", "gated_delta_rule", "token", _gated_delta, ("beta",)),
    Oracle("delta_rule", "kda", "channel", _kda, ("beta",)),
    Oracle("dplr", "dplr", "channel", _dplr, ("a", "b")),
)


def make_inputs(oracle: Oracle, batch: int, length: int) -> Inputs:
    """Random float32 inputs of the kind that a model gives."""
    vector, number = (batch, length, HEADS, KEYS), (batch, length, HEADS)
    key, rate = normalize(torch.randn(vector), dim=-1), torch.sigmoid(torch.randn(vector))
    made = {
        "q": torch.randn(vector),
        "k": normalize(torch.randn(vector), dim=-1),
        "v": torch.randn(batch, length, HEADS, VALUES),
        "beta": torch.sigmoid(torch.randn(number)),
        "a": -key,
        "b": key * rate,
        "bonus": torch.randn(HEADS, KEYS),
    }
    inputs = {name: made[name] for name in ("q", "k", "v", *oracle.extra)}
    if oracle.normalize:
        inputs |= {name: inputs[name].exp() for name in ("q", "k")}
    if oracle.decay == "head":
        inputs["log_decay"] = torch.log1p(-torch.exp2(-5.0 - torch.arange(HEADS)))
    elif oracle.decay is not None:
        inputs["log_decay"] = logsigmoid(torch.randn(number if oracle.decay == "token" else vector) + 2.0)
    return inputs


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest error over the largest value; the error itself where all values are 0."""
    return (found - expected).abs().max().item() / (expected.abs().max().item() or 1.0)


def with_gradients(run: Callable[[Inputs, Tensor | None], Result], inputs: Inputs, state: Tensor | None) -> Inputs:
    """Output, state and the gradient of everything, under the same random cotangents for whoever computes."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    if state is not None:
        leaves["initial_state"] = state.detach().requires_grad_()
    o, last = run({name: x for name, x in leaves.items() if name != "initial_state"}, leaves.get("initial_state"))
    random = torch.Generator().manual_seed(1)
    results = {"o": o} if last is None else {"o": o, "state": last}
    cotangents = [torch.randn(x.shape, generator=random) for x in results.values()]
    gradients = torch.autograd.grad(tuple(results.values()), tuple(leaves.values()), cotangents, allow_unused=True)
    found = {f"d {name}": gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
    return {name: x.detach() for name, x in {**results, **found}.items()}


def cases(oracle: Oracle) -> Iterator[tuple[str, Inputs, Tensor | None, Tensor | None]]:
    """What both are run on: a name, inputs, an initial state and the bounds of packed sequences."""
    shape = (HEADS, KEYS, VALUES)
    for length in LENGTHS:
        if oracle.normalize and length == 1:
            continue  # o = v whatever q and k are: their gradients are rounding errors
        yield f"T={length}", make_inputs(oracle, BATCH, length), None, None
    if oracle.takes_state:
        yield f"T={LENGTHS[-1]}, state", make_inputs(oracle, BATCH, LENGTHS[-1]), torch.randn(BATCH, *shape), None
        bounds = torch.tensor([0, *itertools.accumulate(PACKED)])
        inputs = make_inputs(oracle, 1, sum(PACKED))
        yield f"packed {'+'.join(map(str, PACKED))}, state", inputs, torch.randn(len(PACKED), *shape), bounds


def separately(oracle: Oracle, bounds: Tensor) -> Callable[[Inputs, Tensor | None], Result]:
    """Theirs on one packed sequence after another."""

    def run(inputs: Inputs, state: Tensor | None) -> Result:
        assert state is not None
        outputs, states = [], []
        for n, (start, stop) in enumerate(itertools.pairwise(bounds.tolist())):
            tokens = {name: x if name == "bonus" else x[:, start:stop] for name, x in inputs.items()}
            o, last = oracle.theirs(tokens, state[n : n + 1])
            assert last is not None
            outputs.append(o)
            states.append(last)
        return torch.cat(outputs, 1), torch.cat(states)

    return run


def ways(operator: str) -> list[tuple[str, str, str]]:
    """How ours can compute it: a name, the form and the backend; with native kernels where it has them."""
    kernels = [("native", "auto", "native")] if has_kernels(operator) else []
    return [*((form, form, "torch") for form in FORMS), *kernels]


def rows(oracles: Sequence[Oracle] = ORACLES) -> list[dict[str, str | float]]:
    """For each operator, oracle, form and case the largest relative error of each result and gradient.

    Raises:
        ValueError: fla-core is not installed.
    """
    torch.manual_seed(0)
    made: list[dict[str, str | float]] = []
    for oracle in oracles:
        for case, inputs, state, bounds in cases(oracle):
            theirs = oracle.theirs if bounds is None else separately(oracle, bounds)
            expected = with_gradients(theirs, inputs, state)
            for way, form, backend in ways(oracle.operator):
                run = partial(oracle.ours, form=form, cu_seqlens=bounds, backend=backend)
                found = with_gradients(run, inputs, state)
                errors = {name: relative(found[name], expected[name]) for name in expected}
                made.append({"operator": oracle.operator, "oracle": oracle.name, "form": way, "case": case, **errors})
    return made


def main() -> None:
    """Prints the table."""
    table = rows()
    named = ("operator", "oracle", "form", "case")
    measured = list(dict.fromkeys(name for row in table for name in row if name not in named))
    widths = {name: max(len(name), *(len(str(row[name])) for row in table)) for name in named}
    print("  ".join([*(name.ljust(widths[name]) for name in named), *(f"{name:>7}" for name in measured)]))
    for row in table:
        numbers = (f"{row[name]:.1e}" if name in row else "" for name in measured)
        cells = (f"{number:>{max(len(name), 7)}}" for name, number in zip(measured, numbers, strict=True))
        print("  ".join([*(str(row[name]).ljust(widths[name]) for name in named), *cells]))


if __name__ == "__main__":
    main()
