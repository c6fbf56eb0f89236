"""Measures how well a run predicts text: perplexity, bits per byte, loss by position."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from everlong.cli import console
from everlong.config import config, from_dict
from everlong.data.loader import Dataset, TokenSplit
from everlong.data.packing import FILE as DATASET
from everlong.data.packing import Progress as Preparing
from everlong.data.packing import prepare, read_info
from everlong.data.tokenizer import Tokenizer
from everlong.models import run as runs
from everlong.models.baselines import ByteNGram, xz_bits_per_byte
from everlong.train.evaluate import Evaluation, evaluate, merge, sample
from everlong.train.folder import SETTINGS, read_settings
from everlong.train.precision import Asked, resolve
from everlong.train.settings import TrainConfig

LARGEST = 1 << 40  # tokens: more is a slip
LENGTH = 512  # of windows where the run does not say with what it was trained


@config
class Arguments:
    """Measures how well a run predicts text: perplexity, bits per byte, loss by position.

    Beside it stand a 5-gram of bytes fitted on the training part, and `xz -9`, on the same held-out documents.
    Example: everlong eval runs/stdlib --data python-stdlib
    """

    run: Positional[str]
    """The run folder."""
    data: Annotated[str, tyro.conf.arg(metavar="SRC")]
    """A folder prepared with the run's tokenizer, or any source that `everlong prepare` takes."""
    split: Literal["heldout", "train", "all"] = "heldout"
    """Which documents."""
    length: int | None = None
    """Tokens of a window; by default what the run was trained with."""
    stride: int | None = None
    """Tokens between windows: each has at least length - stride tokens of context. By default half of the length."""
    max_tokens: int | None = None
    """Score only a fixed sample of documents, of about so many tokens."""
    batch_size: int | None = None
    """Windows at a time; it changes the speed only."""
    precision: Asked = "auto"
    """Of matrix products; auto is bf16 where the processor has instructions for it."""
    text_field: str = "text"
    """The field of JSONL and Parquet that holds the text."""
    baselines: bool = True
    """Compare with the 5-gram and with xz."""

    def __post_init__(self) -> None:
        for name in ("length", "stride", "max_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= LARGEST:
                bound = "at least 1" if value < 1 else f"at most {LARGEST:,}"
                raise ValueError(f"`{name}` must be {bound}: got {value:,}")


def run(arguments: Arguments) -> dict[str, object]:
    """Evaluates, and tells what came of it."""
    model = runs.load(arguments.run)
    length = arguments.length or _trained_length(Path(arguments.run))
    with _opened(arguments, runs.load_tokenizer(arguments.run)) as dataset:
        names = ("train", "heldout") if arguments.split == "all" else (arguments.split,)
        splits = [split for name in names if len(split := dataset.split(name))]
        if not splits:
            raise ValueError(f"`{arguments.data}` has no {arguments.split} documents: prepare it with more --held-out")
        with console.progress("evaluating") as report:
            found = merge(
                evaluate(
                    model,
                    split,
                    length=length,
                    stride=arguments.stride,
                    batch_size=arguments.batch_size,
                    max_tokens=arguments.max_tokens,
                    precision=resolve(arguments.precision),
                    report=lambda done, total: report(done, f"{done:,} of {total:,} tokens", total=total),
                )
                for split in splits
            )
        compared = _baselines(arguments, dataset, splits) if arguments.baselines else {}
    return _tell(arguments, length, found, compared)


def _trained_length(folder: Path) -> int:
    """The length of the sequences that the run was trained on."""
    if not (folder / SETTINGS).is_file():
        return LENGTH
    return from_dict(TrainConfig, read_settings(folder)["train"]).length


@contextmanager
def _opened(arguments: Arguments, tokenizer: Tokenizer) -> Iterator[Dataset]:
    """The data: a prepared folder as it is, another source prepared in a temporary folder as the training data was.

    Raises:
        ValueError: the folder was prepared with another tokenizer.
    """
    place = Path(arguments.data)
    if (place / DATASET).is_file():
        dataset = Dataset.open(place)
        if dataset.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"{place} was prepared with another tokenizer than {arguments.run}: give the source itself to --data, "
                f"or prepare it with --tokenizer {arguments.run}"
            )
        yield dataset
        return
    held_out, seed = _split_rule(Path(arguments.run))
    with tempfile.TemporaryDirectory(prefix="everlong-") as folder:
        with console.progress(f"preparing {arguments.data}") as report:

            def tell(progress: Preparing) -> None:
                report(progress.done, progress.stage, total=progress.total)

            prepare(
                arguments.data,
                Path(folder) / "data",
                tokenizer=tokenizer,
                held_out=held_out,
                seed=seed,
                text_field=arguments.text_field,
                report=tell,
            )
        yield Dataset.open(Path(folder) / "data")


def _split_rule(folder: Path) -> tuple[float, int]:
    """The share that was held out of the run's training data, and the seed by which it was chosen."""
    if (folder / SETTINGS).is_file():
        prepared = Path(read_settings(folder)["data"])
        if (prepared / DATASET).is_file():
            options = read_info(prepared).options
            return options.held_out, options.seed
    return 0.1, 0


def _baselines(arguments: Arguments, dataset: Dataset, splits: Sequence[TokenSplit]) -> dict[str, float]:
    """Bits per byte of the same documents by other means.

    The 5-gram is fitted on the training part, so it stands only beside an evaluation of the held-out part.
    """
    documents = [text for split in splits for text in _texts(dataset, split, arguments.max_tokens)]
    found: dict[str, float] = {}
    train = dataset.split("train")
    if arguments.split == "heldout" and len(train):
        with console.progress("baseline: 5-gram of bytes", int(train.bytes.sum())) as report:
            gram = ByteNGram(order=5).fit(_counted(_texts(dataset, train), report))
            found["five_gram"] = gram.bits_per_byte(documents)
    with console.progress("baseline: xz -9", sum(map(len, documents))) as report:
        found["xz"] = xz_bits_per_byte(_counted(documents, report))
    return found


def _texts(dataset: Dataset, split: TokenSplit, max_tokens: int | None = None) -> Iterator[bytes]:
    """The documents that an evaluation scores, as the bytes that they were."""
    for document, tokens in sample(split, max_tokens):
        yield dataset.tokenizer.decode_bytes(split.document(document)[:tokens].tolist())


def _counted(documents: Iterable[bytes], report: console.Report) -> Iterator[bytes]:
    """The documents as they are taken, with a report of how many bytes that makes."""
    done = 0
    for document in documents:
        yield document
        done += len(document)
        report(done, console.size(done))


def _tell(arguments: Arguments, length: int, found: Evaluation, compared: dict[str, float]) -> dict[str, object]:
    """The result for a person, and for a program."""
    names = {"five_gram": "byte 5-gram", "xz": "xz -9"}
    console.table(
        ["", "bits per byte"],
        [
            (arguments.run, f"{found.bits_per_byte:.4f}"),
            *((names[key], f"{value:.4f}") for key, value in compared.items()),
        ],
    )
    console.fields(
        {
            "loss": f"{found.loss:.4f} nats per token",
            "perplexity": f"{found.perplexity:.3f}",
            "accuracy": f"{found.accuracy:.2%}",
            "scored": f"{found.tokens:,} tokens, {found.bytes:,} bytes, {found.documents:,} documents",
            "speed": f"{console.count(found.tokens_per_second)} tokens/s",
        }
    )
    console.table(
        ["tokens before", "loss", "tokens"],
        [
            (f"{b.first}" if b.first == b.last else f"{b.first}-{b.last}", f"{b.loss:.4f}", b.tokens)
            for b in found.loss_by_position
        ],
        title="loss by position",
    )
    return {
        "run": arguments.run,
        "split": arguments.split,
        "length": length,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "accuracy": found.accuracy,
        "tokens": found.tokens,
        "bytes": found.bytes,
        "documents": found.documents,
        "seconds": found.seconds,
        "tokens_per_second": found.tokens_per_second,
        "baselines": compared,
        "loss_by_position": [b._asdict() for b in found.loss_by_position],
    }
