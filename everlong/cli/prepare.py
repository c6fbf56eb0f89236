"""Text to packed tokens: trains a tokenizer, splits by document, writes what training reads."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tyro.conf import Positional

from everlong.cli import console
from everlong.cli.places import check_free
from everlong.config import config
from everlong.data.packing import Preparation, Progress, prepare
from everlong.data.tokenizer import Tokenizer


@config
class Arguments:
    """Prepares text for training: a tokenizer, and the tokens of every document, a part of them held out.

    Example: everlong prepare python-stdlib --out data/python --vocab-size 4096
    """

    sources: Positional[tuple[str, ...]]
    """Text files, folders, JSONL or Parquet files, or the word python-stdlib."""
    out: Path
    """The folder to make; one that holds this very result already is left as it is."""
    vocab_size: int = 4096
    """Tokens of the byte-level BPE that is trained on the training part; 257 is one token a byte."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a folder or run that has one, to be used instead of training one."""
    held_out: float = 0.1
    """The share of the documents that training never sees; of fewer than 10, the end of each."""
    seed: int = 0
    """Decides which documents are held out."""
    text_field: str = "text"
    """The field of JSONL rows, or the column of Parquet files, that holds the text."""


def run(arguments: Arguments) -> dict[str, object]:
    check_free(arguments.out)
    with _progress() as report:
        done = prepare(
            arguments.sources,
            arguments.out,
            vocab_size=arguments.vocab_size,
            tokenizer=Tokenizer.load(arguments.tokenizer) if arguments.tokenizer else None,
            held_out=arguments.held_out,
            seed=arguments.seed,
            text_field=arguments.text_field,
            report=report,
        )
    _show(arguments.out, done)
    return {
        "out": str(arguments.out),
        "reused": done.reused,
        "fingerprint": done.info.fingerprint,
        "vocab_size": done.info.vocab_size,
        "splits": {name: _measure(done, name) for name in done.info.splits},
        "skipped": [{"name": one.name, "reason": one.reason} for one in done.skipped],
        "seconds": done.seconds,
        "megabytes_per_second": done.megabytes_per_second,
    }


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """A progress line for each stage, closed when the next one begins."""
    with ExitStack() as line:
        shown: dict[str, console.Report] = {}

        def report(now: Progress) -> None:
            if now.stage not in shown:
                line.close()
                shown[now.stage] = line.enter_context(console.progress(now.stage.capitalize(), now.total))
            shown[now.stage](now.done, console.size(now.done), total=now.total)

        yield report


def _measure(done: Preparation, name: str) -> dict[str, object]:
    split = done.info.splits[name]
    return {
        "documents": split.documents,
        "tokens": split.tokens,
        "bytes": split.bytes,
        "bytes_per_token": split.bytes / max(split.tokens, 1),
    }


def _show(out: Path, done: Preparation) -> None:
    rows = []
    for name, split in done.info.splits.items():
        ratio = f"{split.bytes / max(split.tokens, 1):.2f}"
        rows.append((name, split.documents, console.size(split.bytes), console.count(split.tokens), ratio))
    console.table(("split", "documents", "text", "tokens", "bytes a token"), rows)
    if done.skipped:
        first = done.skipped[0]
        print(f"{len(done.skipped)} left out, such as {first.name} ({first.reason})")
    if done.reused:
        print(f"{out} holds this already: texts and options are the same")
    else:
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in done.seconds.items())
        print(f"{out} is ready: {stages} ({done.megabytes_per_second:.1f} MB/s)")
    print(f"Next: everlong train --data {out} --mixer gated_deltanet --minutes 10 --out runs/{out.name}")
