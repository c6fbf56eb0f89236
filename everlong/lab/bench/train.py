"""Training: how fast it is beside transformers, preparing beside `tokenizers`, and what the import costs.

An update is all that a training does for it: forward, loss, backward, clipping, AdamW. Both sides have the same shape,
batch, arithmetic and optimizer, take turns in one process that keeps freed memory, and are warmed up before.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from everlong.data.packing import prepare
from everlong.data.sources import STDLIB, documents
from everlong.data.tokenizer import Tokenizer
from everlong.lab.bench.result import Row, milliseconds, wanted
from everlong.models.lm import LanguageModel, ModelConfig
from everlong.train import compilation, optimizers, precision
from everlong.train.precision import Precision

SHAPE: dict[str, Any] = {"vocab_size": 4096, "width": 384, "num_layers": 6}
HEADS = 6
TOKENS = 8192  # of an update
ROUNDS, WARMUP = 9, 3
RATE = 1e-3
CLIP = 1.0

Loss = Callable[[Tensor, Tensor], Tensor]


def rows(only: str | None = None) -> Iterator[Row]:
    """Tokens a second over those of transformers' Llama; MB/s over those of `tokenizers`; seconds of the import."""
    trained: dict[str, tuple[int, Precision, bool, str | None]] = {
        "eager, bf16, T = 512": (512, "bf16", False, ">= 1.6"),
        "eager, bf16, T = 1,024": (1024, "bf16", False, ">= 1.6"),
        "eager, bf16, T = 4,096": (4096, "bf16", False, None),
        "eager, float32, T = 1,024": (1024, "float32", False, ">= 1.3"),
        "compiled, bf16, T = 512": (512, "bf16", True, ">= 1.1"),
    }
    measures: dict[str, Callable[[str], Row]] = {
        f"tokens/s of training over transformers' Llama, {name}": lambda measure, how=how: _training(measure, *how)
        for name, how in trained.items()
    }
    measures["MB/s of preparing over tokenizers' batch encoding"] = _preparing
    measures["seconds to import everlong beyond torch"] = _importing
    for measure in wanted(measures, only):
        yield measures[measure](measure)


def _training(measure: str, length: int, arithmetic: Precision, compiled: bool, target: str | None) -> Row:
    sides = {"ours": _ours(compiled), "theirs": _theirs(compiled)}
    tokens = torch.randint(SHAPE["vocab_size"], (TOKENS // length, length + 1))
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(WARMUP + ROUNDS):
        for side, update in sides.items():
            began = time.perf_counter()
            update(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), arithmetic)
            if turn >= WARMUP:
                times[side].append(time.perf_counter() - began)
    ours, theirs = (median(values) for values in times.values())
    raw = {
        "ours_tokens_per_second": round(TOKENS / ours),
        "theirs_tokens_per_second": round(TOKENS / theirs),
        "ours_ms": [milliseconds([value]) for value in times["ours"]],
        "theirs_ms": [milliseconds([value]) for value in times["theirs"]],
    }
    return Row(measure, round(theirs / ours, 3), target, "transformers' LlamaForCausalLM", raw)


def _ours(compiled: bool) -> Callable[[Tensor, Tensor, Precision], None]:
    torch.manual_seed(0)
    layers = ({"mixer": "attention", "num_heads": HEADS},)
    model = LanguageModel(ModelConfig(**SHAPE, layers=layers))
    loss = compilation.compiled(model) if compiled else compilation.eager(model)
    rates = {"learning_rate": RATE, "matrix_learning_rate": RATE, "embedding_learning_rate": RATE, "weight_decay": 0.0}
    optimizer = optimizers.Optimizers(model, "adamw", **rates)
    return _update(model, loss, optimizer.step, optimizer.zero_grad)


def _theirs(compiled: bool) -> Callable[[Tensor, Tensor, Precision], None]:
    """The peer, with its own loss; its labels are shifted inside, so it is given the targets as they are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": SHAPE["vocab_size"],
        "hidden_size": SHAPE["width"],
        "intermediate_size": ModelConfig(**SHAPE).hidden,
        "num_hidden_layers": SHAPE["num_layers"],
        "num_attention_heads": HEADS,
        "tie_word_embeddings": True,
        "max_position_embeddings": TOKENS,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape)).train()
    run = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        value: Tensor = run(input_ids=tokens, labels=tokens, shift_labels=targets, use_cache=False).loss
        return value

    return _update(model, loss, optimizer.step, optimizer.zero_grad)


def _update(
    model: nn.Module, loss_of: Loss, step: Callable[[], Any], forget: Callable[[], None]
) -> Callable[[Tensor, Tensor, Precision], None]:
    def update(tokens: Tensor, targets: Tensor, arithmetic: Precision) -> None:
        with compilation.quiet():
            with precision.autocast(arithmetic):
                loss = loss_of(tokens, targets)
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        step()
        forget()

    return update


def _preparing(measure: str) -> Row:
    """The whole preparation of the standard library's text by a tokenizer that is there, beside its encoding alone."""
    import tokenizers

    texts = [document.text for document in documents(STDLIB)]
    size = sum(len(text.encode()) for text in texts) / 1e6
    with TemporaryDirectory(prefix="everlong-") as place:
        prepare(STDLIB, Path(place) / "first")
        tokenizer = Tokenizer.load(Path(place) / "first")
        peer = tokenizers.Tokenizer.from_file(str(Path(place) / "first" / "tokenizer.json"))
        ours, theirs = [], []
        for turn in range(3):
            began = time.perf_counter()
            prepare(STDLIB, Path(place) / f"again-{turn}", tokenizer=tokenizer)
            ours.append(time.perf_counter() - began)
            began = time.perf_counter()
            peer.encode_batch(texts)
            theirs.append(time.perf_counter() - began)
    raw = {"ours_mb_per_second": round(size / median(ours), 2), "theirs_mb_per_second": round(size / median(theirs), 2)}
    return Row(measure, round(median(theirs) / median(ours), 3), ">= 0.7", "tokenizers' encode_batch", raw)


def _importing(measure: str) -> Row:
    """`import everlong` and its names from below, in fresh processes that have loaded torch."""
    code = (
        "import time, torch; began = time.perf_counter(); import everlong; everlong.LanguageModel; everlong.load; "
        "everlong.generate; everlong.ops; print(time.perf_counter() - began)"
    )
    times = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(float(done.stdout))
    return Row(measure, round(median(times), 3), "<= 0.5", raw={"seconds": times})
