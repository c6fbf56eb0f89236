"""Kernels inside what torch puts around operators: autocast, checkpointing, batches, several processes."""

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from everlong import mixers, ops
from everlong.ops import dispatch, use_backend

NAMES = ["attention", "gated_deltanet", "gla", "mamba", "mamba2", "lru", "rwkv7"]  # between them all operators


def gradients(run, module, x):
    with use_backend("native"):
        loss = run(module, x)
        return torch.autograd.grad(loss, [x, *module.parameters()], allow_unused=True)


def layer(name):
    torch.manual_seed(0)
    found = mixers.load(name)
    return found(found.Config(width=32)), torch.randn(2, 70, 32).requires_grad_()


def plain(module, x):
    return module(x)[0].square().sum()


def test_these_mixers_use_all_operators(monkeypatch):
    used = set()
    choose = dispatch.choose

    def note(operator, *arguments, **options):
        used.add(operator)
        return choose(operator, *arguments, **options)

    monkeypatch.setattr(dispatch, "choose", note)
    for module in ("recurrence", "delta"):
        monkeypatch.setattr(f"everlong.ops.{module}.choose", note)
    for name in NAMES:
        gradients(plain, *layer(name))
    assert used == {operator for operator in dispatch.TABLE if not operator.endswith("_tree")}


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_bit(name):
    module, x = layer(name)
    for one, other in zip(
        gradients(plain, module, x),
        gradients(lambda m, x: checkpoint(plain, m, x, use_reentrant=False), module, x),
        strict=True,
    ):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    module, x = layer(name)

    def in_bfloat16(module, x):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(module, x)

    exact, rounded = gradients(plain, module, x), gradients(in_bfloat16, module, x)
    assert rounded[0].dtype == torch.float32
    assert (rounded[0] - exact[0]).norm() <= 0.1 * exact[0].norm()


# Two processes with half of the batch each: the gradients that they agree on are those of the whole batch.
WORKER = """
import sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from everlong import mixers
rank, place = int(sys.argv[1]), sys.argv[2]
store = distributed.FileStore(place, 2)
distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
torch.manual_seed(0)
found = mixers.load("gated_deltanet")
module = found(found.Config(width=32))
x = torch.randn(4, 70, 32)
parallel = DistributedDataParallel(module)
parallel(x[2 * rank : 2 * rank + 2])[0].square().mean().backward()
shared = [parameter.grad.clone() for parameter in module.parameters()]
module.zero_grad()
module(x)[0].square().mean().backward()
for ours, whole in zip(shared, module.parameters(), strict=True):
    torch.testing.assert_close(ours, whole.grad, rtol=1e-4, atol=1e-6)
distributed.destroy_process_group()
print("equal")
"""


def test_several_processes(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        out, err = worker.communicate(timeout=300)
        assert out.strip() == "equal", err


def test_a_row_does_not_depend_on_the_others():
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 70, 2, 32).bfloat16() for _ in range(3))
    beta, decay = torch.rand(3, 70, 2), -torch.rand(3, 70, 2)
    u, gate = torch.randn(3, 70, 24).bfloat16(), torch.rand(3, 70, 24)
    rates, projection = -torch.rand(24, 8), torch.randn(3, 70, 8)
    calls = {
        "linear": lambda at: ops.linear_attention(q[at], k[at], v[at], log_decay=decay[at])[0],
        "delta": lambda at: ops.delta_rule(q[at], k[at], v[at], beta[at], log_decay=decay[at])[0],
        "dplr": lambda at: ops.dplr(q[at], k[at], v[at], -k[at] / 9, k[at] / 9)[0],
        "softmax": lambda at: ops.softmax_attention(q[at], k[at], v[at]),
        "scan": lambda at: ops.linear_scan(gate[at], u[at])[0],
        "selective": lambda at: ops.selective_scan(u[at], gate[at], rates, projection[at], projection[at])[0],
        "convolution": lambda at: ops.causal_conv1d(u[at], torch.ones(24, 4))[0],
    }
    with use_backend("native"):
        for name, call in calls.items():
            for row in range(3):
                assert torch.equal(call(slice(row, row + 1)), call(slice(None))[row : row + 1]), name


@pytest.mark.parametrize("form", dispatch.FORMS)
def test_a_backend_that_is_asked_for_serves_every_form(monkeypatch, form):
    dispatch._decide.cache_clear()
    monkeypatch.setenv("EVERLONG_BACKEND", "reference")
    try:
        chosen = dispatch.choose("linear_attention", "auto", torch.ones(1), form)
    finally:
        dispatch._decide.cache_clear()
    assert chosen.__name__ == "linear_attention_reference"
