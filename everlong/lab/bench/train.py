"""Training: how fast it is beside transformers, preparing beside `tokenizers`, and what the import costs."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from everlong.data.packing import prepare
from everlong.data.sources import STDLIB, documents
from everlong.data.tokenizer import Tokenizer
from everlong.lab.bench import updates
from everlong.lab.bench.result import Row, wanted
from everlong.lab.bench.updates import Size, beside
from everlong.train.precision import Precision

SIZE = Size(width=384, num_layers=6)
TOKENS = 8192  # of an update
ROUNDS, WARMUP = 9, 3


def rows(only: str | None = None) -> Iterator[Row]:
    """Tokens a second over those of transformers' Llama; MB/s over those of `tokenizers`; seconds of the import."""
    trained: dict[str, tuple[int, Precision, bool, str | None]] = {
        "eager, bf16, T = 512": (512, "bf16", False, ">= 1.6"),
        "eager, bf16, T = 1,024": (1024, "bf16", False, ">= 1.6"),
        "eager, bf16, T = 4,096": (4096, "bf16", False, None),
        "eager, float32, T = 1,024": (1024, "float32", False, ">= 1.3"),
        "compiled, bf16, T = 512": (512, "bf16", True, ">= 1.1"),
    }
    # Without apostrophes: torch.compile writes what follows `--only` on the command line into its code as it is.
    measures: dict[str, Callable[[str], Row]] = {
        f"tokens/s of training over Llama of transformers, {name}": lambda measure, how=how: _training(measure, *how)
        for name, how in trained.items()
    }
    measures["MB/s of preparing over batch encoding by tokenizers"] = _preparing
    measures["seconds to import everlong beyond torch"] = _importing
    for measure in wanted(measures, only):
        yield measures[measure](measure)


def _training(measure: str, length: int, arithmetic: Precision, compiled: bool, target: str | None) -> Row:
    heads = {"mixer": "attention", "num_heads": SIZE.heads}
    return beside(
        measure,
        {
            "ours": updates.ours(SIZE, heads, compiled=compiled),
            "theirs": updates.llama(SIZE, longest=TOKENS, compiled=compiled),
        },
        vocabulary=SIZE.vocab_size,
        batch=TOKENS // length,
        length=length,
        arithmetic=arithmetic,
        target=target,
        peer="transformers' LlamaForCausalLM",
        least=ROUNDS,
        most=ROUNDS,
        warmup=WARMUP,
    )


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
