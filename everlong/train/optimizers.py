"""Optimizers over groups of parameters, and schedules of the learning rate that depend on the step alone.

    matrices      weights of linear layers inside the model    Muon (Jordan 2024; scaled as in Liu et al. 2025,
                                                               arXiv 2502.16982) or AdamW, with weight decay
    embeddings    embedding tables and heads                   AdamW, without decay (OLMo 2, arXiv 2501.00656)
    rest          gains, biases, rates, short convolutions     AdamW, without decay

Both are torch's own. Muon's updates are scaled to the RMS of AdamW's: one learning rate means the same for every shape.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["muon", "adamw"]
Schedule = Literal["wsd", "cosine", "constant"]
BETAS = (0.9, 0.95)
HEADS = frozenset({"head", "heads"})


@dataclass(frozen=True)
class Groups:
    """Every trainable parameter of a model once, by name."""

    matrices: dict[str, nn.Parameter]
    embeddings: dict[str, nn.Parameter]
    rest: dict[str, nn.Parameter]


def groups(model: nn.Module) -> Groups:
    """Sorts the parameters by the module that owns them: a gain of shape `[H, V]` has two axes and is no matrix."""
    linear, tables = set(), set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and name.partition(".")[0] in HEADS):
            tables.add(module.weight)
        elif isinstance(module, nn.Linear):
            linear.add(module.weight)
    found = Groups({}, {}, {})
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        home = found.embeddings if parameter in tables else found.matrices if parameter in linear else found.rest
        home[name] = parameter
    return found


class Optimizers:
    """The optimizers of one model as one: a step, and a state that is a flat mapping of tensors by parameter's name."""

    def __init__(
        self,
        model: nn.Module,
        kind: Kind,
        *,
        learning_rate: float,
        matrix_learning_rate: float,
        embedding_learning_rate: float,
        weight_decay: float,
    ) -> None:
        found = groups(model)
        self.parameters = {**found.matrices, **found.embeddings, **found.rest}
        if not self.parameters:
            raise ValueError("the model has no parameter that asks for a gradient: there is nothing to train")
        decayed = {"params": list(found.matrices.values()), "lr": matrix_learning_rate, "weight_decay": weight_decay}
        plain = [
            {"params": list(found.embeddings.values()), "lr": embedding_learning_rate, "weight_decay": 0.0},
            {"params": list(found.rest.values()), "lr": learning_rate, "weight_decay": 0.0},
        ]
        self.members: list[torch.optim.Optimizer] = []
        if kind == "muon" and found.matrices:
            self.members.append(torch.optim.Muon([decayed], adjust_lr_fn="match_rms_adamw"))
            adam = plain
        else:
            adam = [decayed, *plain]
        if adam := [group for group in adam if group["params"]]:
            self.members.append(torch.optim.AdamW(adam, betas=BETAS, fused=True))
        self._groups = [group for member in self.members for group in member.param_groups]
        self._rates: list[float] = [group["lr"] for group in self._groups]

    def set_rate(self, factor: float) -> None:
        """Sets each group's learning rate to `factor` times the one that it was made with."""
        for group, rate in zip(self._groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def step(self) -> None:
        """Updates the parameters from their gradients."""
        for member in self.members:
            member.step()

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """What the optimizers remember, as "parameter's name/what": "blocks.0.mixer.q.weight/momentum_buffer"."""
        memory = {parameter: values for member in self.members for parameter, values in member.state.items()}
        return {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in memory.get(parameter, {}).items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the memory back.

        Raises:
            ValueError: it names a parameter that the model does not have.
        """
        owners = {p: member for member in self.members for group in member.param_groups for p in group["params"]}
        for member in self.members:
            member.state.clear()
        for place, value in state.items():
            name, _, key = place.rpartition("/")
            if name not in self.parameters:
                raise ValueError(f"the optimizer's state is of another model: there is no parameter `{name}` here")
            parameter = self.parameters[name]
            owners[parameter].state[parameter][key] = value.clone()


def rate(schedule: Schedule, step: int, steps: int | None, *, warmup: int, decay: float) -> float:
    """The factor on the learning rate for the update after `step` updates.

    It rises linearly over `warmup` updates; then "wsd" stays and falls linearly to 0 over the last fraction `decay`
    (Hu et al. 2024, arXiv 2404.06395), "cosine" falls to 0 over all that is left. `steps` None, a length that is not
    known yet, is a run without an end.
    """
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if steps is None or schedule == "constant":
        return rise
    if schedule == "cosine":
        done = max(0, step - warmup) / max(1, steps - warmup)
        return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    falling = max(1, round(decay * steps))
    return rise * min(1.0, max(0, steps - step) / falling)
