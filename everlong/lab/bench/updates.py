"""Updates of language models, ours and transformers', as they are timed beside each other.

An update is all that a training does for it: forward, loss, backward, clipping, AdamW. Both sides have the same shape,
batch, arithmetic and optimizer, take turns in one process that keeps freed memory, and are warmed up before.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from everlong.lab.bench.result import Row, milliseconds
from everlong.lab.bench.turns import in_turns
from everlong.models.lm import LanguageModel, Layer, ModelConfig
from everlong.train import compilation, optimizers, precision
from everlong.train.precision import Precision

RATE = 1e-3
CLIP = 1.0

Loss = Callable[[Tensor, Tensor], Tensor]
Update = Callable[[Tensor, Tensor, Precision], None]


@dataclass(frozen=True)
class Size:
    """Of a model: heads of 64 channels, where it has heads."""

    width: int
    num_layers: int
    vocab_size: int = 4096
    feed_forward: int | None = None

    @property
    def heads(self) -> int:
        return self.width // 64

    def config(self, layer: Layer) -> ModelConfig:
        """Ours of this size, with this mixer in every layer."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            width=self.width,
            num_layers=self.num_layers,
            feed_forward=self.feed_forward,
            layers=(layer,),
        )


def beside(
    measure: str,
    sides: Mapping[str, Update],
    *,
    vocabulary: int,
    batch: int,
    length: int,
    arithmetic: Precision,
    target: str | None,
    peer: str,
    **turns: float | int,
) -> Row:
    """Tokens a second of the first side over those of the second."""
    tokens = torch.randint(vocabulary, (batch, length + 1))
    read, predicted = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    calls = {side: lambda update=update: update(read, predicted, arithmetic) for side, update in sides.items()}
    times = in_turns(calls, **turns)  # type: ignore[arg-type]
    first, second = times
    raw = {f"{side}_tokens_per_second": round(batch * length / median(values)) for side, values in times.items()}
    each = {f"{side}_ms": [milliseconds([value]) for value in values] for side, values in times.items()}
    return Row(measure, round(median(times[second]) / median(times[first]), 3), target, peer, {**raw, **each})


def ours(size: Size, layer: Layer, *, compiled: bool = False) -> Update:
    """An update of our model with this mixer in every layer."""
    torch.manual_seed(0)
    model = LanguageModel(size.config(layer))
    loss = compilation.compiled(model) if compiled else compilation.eager(model)
    rates = {"learning_rate": RATE, "matrix_learning_rate": RATE, "embedding_learning_rate": RATE, "weight_decay": 0.0}
    optimizer = optimizers.Optimizers(model, "adamw", **rates)
    return _update(model, loss, optimizer.step, optimizer.zero_grad)


def llama(size: Size, *, longest: int, compiled: bool = False) -> Update:
    """An update of transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": size.vocab_size,
        "hidden_size": size.width,
        "intermediate_size": size.config("attention").hidden,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.heads,
        "tie_word_embeddings": True,
        "max_position_embeddings": longest,
    }
    return _of_transformers(LlamaForCausalLM(LlamaConfig(**shape)), compiled=compiled, shifted=True)


def mamba(size: Size) -> Update:
    """An update of transformers' Mamba, which has no feed-forward."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": size.vocab_size,
        "hidden_size": size.width,
        "num_hidden_layers": size.num_layers,
    }
    return _of_transformers(MambaForCausalLM(MambaConfig(**shape)))


def mamba2(size: Size, *, states: int) -> Update:
    """An update of transformers' Mamba-2, which has no feed-forward."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": size.vocab_size,
        "hidden_size": size.width,
        "num_hidden_layers": size.num_layers,
        "num_heads": 2 * size.heads,
        "head_dim": 64,
        "state_size": states,
        "n_groups": 1,
        "tie_word_embeddings": True,
    }
    return _of_transformers(Mamba2ForCausalLM(Mamba2Config(**shape)))


def _of_transformers(model: Any, *, compiled: bool = False, shifted: bool = False) -> Update:
    """With the model's own loss.

    Args:
        shifted: whether the loss takes the targets as they are; others shift the tokens themselves, and so predict one
            token less of each row.
    """
    model.train()
    run = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        labels = {"shift_labels": targets} if shifted else {}
        value: Tensor = run(input_ids=tokens, labels=tokens, use_cache=False, **labels).loss
        return value

    return _update(model, loss, optimizer.step, optimizer.zero_grad)


def _update(model: nn.Module, loss_of: Loss, step: Callable[[], Any], forget: Callable[[], None]) -> Update:
    def update(tokens: Tensor, targets: Tensor, arithmetic: Precision) -> None:
        with compilation.quiet():
            with precision.autocast(arithmetic):
                loss = loss_of(tokens, targets)
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        step()
        forget()

    return update
