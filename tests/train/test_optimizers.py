"""Groups, schedules and the state of the optimizers."""

import math

import pytest
import torch
from torch import nn

from everlong.train.optimizers import Optimizers, groups, rate


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4))  # two axes, and no matrix


class Tiny(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 8, bias=True)
        self.gain = Gain()
        self.norm = nn.RMSNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x):
        y = self.first(self.embedding(x)).unflatten(-1, (2, 4)) * self.gain.weight
        return self.head(self.norm(y.flatten(-2)))


def optimizers(model, kind="muon"):
    return Optimizers(
        model, kind, learning_rate=0.01, matrix_learning_rate=0.02, embedding_learning_rate=0.04, weight_decay=0.1
    )


def take_step(model, optimizers, seed):
    tokens = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(seed))
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    optimizers.step()
    optimizers.zero_grad()


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_one_group(tied):
    model = Tiny(tied)
    found = groups(model)
    assert set(found.matrices) == {"first.weight"}
    assert set(found.embeddings) == {"embedding.weight"} | (set() if tied else {"head.weight"})
    assert set(found.rest) == {"first.bias", "gain.weight", "norm.weight"}
    for kind in ("muon", "adamw"):
        held = [id(p) for member in optimizers(model, kind).members for g in member.param_groups for p in g["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_a_frozen_parameter_is_in_none():
    model = Tiny()
    model.first.requires_grad_(False)
    assert not groups(model).matrices
    take_step(model, optimizers(model), 0)
    with pytest.raises(ValueError, match="nothing to train"):
        optimizers(model.requires_grad_(False))


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_only_matrices_decay(kind):
    model = Tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers(model, kind).step()
    for name, p in model.named_parameters():
        expected = before[name] * (1 - 0.02 * 0.1) if name == "first.weight" else before[name]
        torch.testing.assert_close(p.detach(), expected, msg=name)


def test_muon_makes_updates_of_the_size_of_adamw():
    """An orthogonal update of shape [A, B] scaled by 0.2 sqrt(max(A, B)) has a root mean square of 0.2."""
    model = nn.Sequential(nn.Linear(64, 192, bias=False))
    before = model[0].weight.detach().clone()
    model[0].weight.grad = torch.randn(192, 64)
    rates = {"learning_rate": 1.0, "matrix_learning_rate": 1.0, "embedding_learning_rate": 1.0}
    Optimizers(model, "muon", **rates, weight_decay=0.0).step()
    assert (model[0].weight - before).square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_the_state_goes_on_bit_for_bit(kind):
    one = Tiny()
    first = optimizers(one, kind)
    for step in range(3):
        take_step(one, first, step)
    other = Tiny()
    other.load_state_dict(one.state_dict())
    second = optimizers(other, kind)
    second.load_state_dict(first.state_dict())
    for step in range(3, 6):
        for model, held in ((one, first), (other, second)):
            held.set_rate(0.5)
            take_step(model, held, step)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    with pytest.raises(ValueError, match="no parameter `strange`"):
        second.load_state_dict({"strange/exp_avg": torch.zeros(1)})


def test_the_rate_scales_every_group():
    held = optimizers(Tiny())
    held.set_rate(0.5)
    assert sorted(g["lr"] for member in held.members for g in member.param_groups) == [0.005, 0.01, 0.02]


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_schedules_rise_from_above_zero_and_never_leave_zero_to_one(schedule):
    values = [rate(schedule, step, 100, warmup=10, decay=0.3) for step in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == pytest.approx(1.0)
    assert all(0 < value <= 1 for value in values)
    assert rate(schedule, 50, None, warmup=10, decay=0.3) == 1.0
    falls = {"wsd": list(range(70, 99)), "cosine": list(range(10, 99)), "constant": []}[schedule]
    assert all((values[i + 1] < values[i]) == (i in falls) for i in range(10, 99))
    if schedule != "constant":
        assert values[-1] < 0.04
        assert rate(schedule, 100, 100, warmup=10, decay=0.3) == pytest.approx(0)


def test_schedules_at_their_edges():
    assert rate("wsd", 85, 100, warmup=0, decay=0.3) == pytest.approx(0.5)
    assert rate("cosine", 55, 100, warmup=10, decay=0.3) == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    for schedule in ("wsd", "cosine", "constant"):
        assert all(0 <= rate(schedule, step, 5, warmup=10, decay=1.0) <= 1 for step in range(6))
        assert all(0 <= rate(schedule, step, 1, warmup=0, decay=0.0) <= 1 for step in range(2))
