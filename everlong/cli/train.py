"""Trains a language model on text and leaves a run folder."""

import dataclasses
import json
import shutil
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import tyro

from everlong import mixers
from everlong.cli import console
from everlong.cli.parsing import Names
from everlong.cli.places import check_free_for_run
from everlong.config import config, from_dict, to_dict
from everlong.data.loader import Dataset, Loader
from everlong.data.packing import FILE as DATASET
from everlong.data.packing import Progress as Preparing
from everlong.data.packing import prepare
from everlong.mixers.base import name_of
from everlong.models import run as runs
from everlong.models.lm import LanguageModel, Layer, ModelConfig
from everlong.train import checkpoint
from everlong.train.checkpoint import Checkpoint
from everlong.train.log import LOG
from everlong.train.loop import Progress, Result, holds_run, train
from everlong.train.settings import TrainConfig

SETTINGS = Path("training") / "settings.json"
RECORDED = {"data": str, "model": dict, "train": dict}
BYTES_A_PARAMETER = 12  # weight, gradient and one moment of the optimizer, in float32
# What may be given anew with --resume: none of it changes what an update computes.
FREE = frozenset({"steps", "evaluate_every", "evaluate_tokens", "final_tokens", "checkpoint_every", "keep", "on_nan"})


@config
class Arguments(TrainConfig):
    """Trains a language model on text and leaves a run folder.

    Example: everlong train --data python-stdlib --mixer gated_deltanet --minutes 4 --out runs/stdlib
    A hybrid: everlong train --data novel.txt --layers mamba2,mamba2,attention:window=128 --out runs/novel
    """

    out: Annotated[str, tyro.conf.arg(metavar="RUN")]
    """The run folder to make."""
    data: Annotated[str | None, tyro.conf.arg(metavar="SRC")] = None
    """A prepared folder, or any source that `everlong prepare` takes."""
    mixer: str | None = None
    """The mixer of every layer, with options after colons: attention:window=128. `everlong mixers` lists them."""
    layers: Names = ()
    """Instead of --mixer: mixers for layer after layer, repeated over the depth."""
    width: int = 256
    """Channels of the model."""
    num_layers: int = 4
    """Blocks of a mixer and a feed-forward."""
    vocab_size: int = 4096
    """Of the tokenizer that is trained where --data is not prepared yet."""
    text_field: str = "text"
    """The field of JSONL and Parquet that holds the text."""
    resume: bool = False
    """Go on with the run in --out from its newest checkpoint; nothing else needs to be given."""
    overwrite: bool = False
    """Remove the run that --out holds first."""


def run(arguments: Arguments) -> dict[str, object]:
    """Trains, and tells what came of it."""
    folder = Path(arguments.out)
    if arguments.resume and arguments.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite removes it: give one of them")
    if arguments.resume:
        model, dataset, settings, start = _resume(arguments, folder)
    else:
        model, dataset, settings = _begin(arguments, folder)
        start = None
    with _Display() as display:
        result = train(model, dataset, settings, folder, start=start, report=display)
    if result.stopped_by is not None:
        name = signal.Signals(result.stopped_by).name
        print(
            f"stopped by {name} after step {result.step}; go on with: everlong train --out {folder} --resume",
            file=sys.stderr,
        )
        raise SystemExit(128 + result.stopped_by)
    return _tell(folder, model, result)


def _begin(arguments: Arguments, folder: Path) -> tuple[LanguageModel, Dataset, TrainConfig]:
    """A new run: the data prepared where it is not, the model with its first weights."""
    if arguments.data is None:
        raise ValueError("needs `--data`: a prepared folder, a text file, a folder of texts, or python-stdlib")
    if (arguments.mixer is None) == (not arguments.layers):
        raise ValueError("needs `--mixer NAME` or `--layers a,b,...`, one of them; `everlong mixers` lists the mixers")
    if (holds_run(folder) or (folder / LOG).exists()) and not arguments.overwrite:
        raise ValueError(f"{folder} holds a run already: go on with it by --resume, or remove it by --overwrite")
    check_free_for_run(folder)
    layers = tuple(parse_layer(layer) for layer in (arguments.layers or (str(arguments.mixer),)))
    shape = {"width": arguments.width, "num_layers": arguments.num_layers, "layers": layers}
    _check_shape(from_dict(ModelConfig, {"vocab_size": arguments.vocab_size, **shape}))
    settings = TrainConfig(**{name: getattr(arguments, name) for name in to_dict(TrainConfig())})
    if arguments.overwrite:
        _clear(folder)
    dataset = _dataset(arguments, folder, settings)
    torch.manual_seed(arguments.seed)
    model = LanguageModel(from_dict(ModelConfig, {"vocab_size": dataset.tokenizer.vocab_size, **shape}))
    _record(folder, dataset, model.config, settings)
    return model, dataset, settings


def _resume(arguments: Arguments, folder: Path) -> tuple[LanguageModel, Dataset, TrainConfig, Checkpoint | None]:
    """A run as it was when its newest whole checkpoint was written; from its beginning where there is none."""
    recorded = read_settings(folder)
    shape, before = from_dict(ModelConfig, recorded["model"]), from_dict(TrainConfig, recorded["train"])
    asked = arguments.layers or ((arguments.mixer,) if arguments.mixer else ())
    if asked and tuple(parse_layer(layer) for layer in asked) != shape.layers:
        raise ValueError(f"{folder} is a run of other layers, and goes on with those: leave --mixer or --layers out")
    _changes(arguments, {"width": shape.width, "num_layers": shape.num_layers}, frozenset())
    settings = from_dict(TrainConfig, {**to_dict(before), **_changes(arguments, to_dict(before), FREE)})
    given = arguments.data is not None and (Path(arguments.data) / DATASET).is_file()
    dataset = Dataset.open(str(arguments.data) if given else recorded["data"])
    _record(folder, dataset, shape, settings)
    with console.progress(f"verifying the checkpoints of {folder}"):
        found = checkpoint.latest(folder / "training")
    for damage in found.damaged:
        print(damage, file=sys.stderr)
    if found.checkpoint is None and found.damaged:
        raise ValueError(f"{folder} has no whole checkpoint to go on from: start again with --overwrite")
    if found.checkpoint is None:
        print(f"{folder} has no checkpoint yet: it begins again", file=sys.stderr)
        torch.manual_seed(settings.seed)
    else:
        print(f"going on from {found.checkpoint.path}", file=sys.stderr)
    return LanguageModel(shape), dataset, settings, found.checkpoint


def _check_shape(shape: ModelConfig) -> None:
    """Raises ValueError where such a model cannot be made, cannot be trained or has no room in memory."""
    for mixer, options in map(shape.mixer, shape.layers):
        if not getattr(options, "causal", True):
            raise ValueError(
                f"a layer of {name_of(mixer)} with causal=False sees the tokens that it is to predict: leave it out"
            )
    period = min(shape.num_layers, len(shape.layers))
    with torch.device("meta"):
        model = LanguageModel(dataclasses.replace(shape, num_layers=period))
    blocks, others = (sum(p.numel() for p in part.parameters()) for part in (model.blocks, model.embedding))
    parameters = others + blocks * shape.num_layers // period
    needed, there = BYTES_A_PARAMETER * parameters, psutil.virtual_memory().total
    if needed > there:
        raise ValueError(
            f"a model of {console.count(parameters)} parameters takes at least {console.size(needed)} while it is "
            f"trained: this machine has {console.size(there)}. Take a smaller --width, --num-layers or --vocab-size"
        )


def _record(folder: Path, dataset: Dataset, shape: ModelConfig, settings: TrainConfig) -> None:
    """Writes down how the training is set up, so that --resume needs nothing else."""
    (folder / SETTINGS).parent.mkdir(parents=True, exist_ok=True)
    described = {"data": str(dataset.folder.resolve()), "model": to_dict(shape), "train": to_dict(settings)}
    runs.write_json(folder / SETTINGS, described)


def read_settings(folder: Path) -> dict[str, Any]:
    """How the training of a run was set up: "data", "model" and "train".

    Raises:
        ValueError: no training was begun there, or what was written down is damaged.
    """
    place = folder / SETTINGS
    if not place.is_file():
        raise ValueError(
            f"{folder} holds no training to go on with: there is no {SETTINGS}. `everlong train --data SRC --mixer "
            f"NAME --out {folder}` begins one"
        )
    try:
        settings = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{place} is no JSON: {error}") from None
    if not isinstance(settings, dict) or any(not isinstance(settings.get(k), t) for k, t in RECORDED.items()):
        raise ValueError(f"{place} is damaged: it must hold {', '.join(RECORDED)}. Start a new run")
    return settings


def parse_layer(text: str) -> Layer:
    """A mixer's name with options after colons: "attention:window=128". The name may be "package.module:Class".

    Raises:
        ValueError: an option is not written as key=value, or is given twice.
    """
    name, *options = text.split(":")
    if options and "=" not in options[0] and name not in mixers.names():
        name = f"{name}:{options.pop(0)}"
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        key = key.replace("-", "_")
        if not key or not equals:
            raise ValueError(f"an option of a layer is written as key=value: got `{option}` in `{text}`")
        if key == "mixer":
            raise ValueError(f"a layer has one mixer, which stands first: got `{option}` in `{text}`")
        if key in values:
            raise ValueError(f"an option of a layer must be given once: `{key}` is given twice in `{text}`")
        values[key] = _value(value)
    return {"mixer": name, **values} if values else name


def _value(text: str) -> Any:
    """A number, true, false or null where it reads as one, the text itself otherwise."""
    try:
        return json.loads({"None": "null", "True": "true", "False": "false"}.get(text, text))
    except ValueError:
        return text


def _changes(arguments: Arguments, recorded: dict[str, Any], free: frozenset[str]) -> dict[str, Any]:
    """What was given anew: not the default, and not as recorded. ValueError where that is not among `free`."""
    usual = {field.name: field.default for field in dataclasses.fields(Arguments)}
    given = {name: getattr(arguments, name) for name in recorded}
    anew = {name: value for name, value in given.items() if value not in (usual[name], recorded[name])}
    for name in anew.keys() - free:
        raise ValueError(
            f"the run was started with {name}={recorded[name]} and goes on with it: leave "
            f"--{name.replace('_', '-')} out, or start a new run"
        )
    return anew


def _data_folder(arguments: Arguments, folder: Path) -> Path:
    """Where the prepared data is, or will be."""
    source = Path(str(arguments.data))
    return source if (source / DATASET).is_file() else folder / "data"


def _dataset(arguments: Arguments, folder: Path, settings: TrainConfig) -> Dataset:
    """The prepared data; a source that is not prepared is, into the run's folder.

    Raises:
        ValueError: the source cannot be used, or is shorter than one sequence; what was prepared for nothing is gone.
    """
    place = _data_folder(arguments, folder)
    made = [path for path in (place, *place.parents) if not path.exists()]
    if place == folder / "data":
        with console.progress(f"preparing {arguments.data}") as report:

            def tell(progress: Preparing) -> None:
                report(progress.done, progress.stage, total=progress.total)

            prepare(
                str(arguments.data),
                place,
                vocab_size=arguments.vocab_size,
                text_field=arguments.text_field,
                seed=arguments.seed,
                report=tell,
            )
    dataset = Dataset.open(place)
    try:
        Loader(dataset.split("train"), length=settings.length, batch_size=settings.rows)
    except ValueError:
        if made:
            shutil.rmtree(made[-1])
        raise
    return dataset


def _clear(folder: Path) -> None:
    """Removes what makes a folder a run, and nothing else."""
    for name in (runs.CONFIG, runs.WEIGHTS, LOG, "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "training", ignore_errors=True)
    if (folder / "data" / DATASET).is_file():
        shutil.rmtree(folder / "data")


class _Display:
    """The live line of a training."""

    def __enter__(self) -> "_Display":
        self.stack, self.activity = ExitStack(), ""
        self.bar: console.Report | None = None
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def __call__(self, now: Progress) -> None:
        if now.note is not None:
            print(now.note, file=sys.stderr)
        if now.activity == "compiling" and self.activity != "compiling" and now.note is None:
            print("compiling the model (about half a minute)", file=sys.stderr)
        self.activity = now.activity
        if now.step == 0:
            return
        if self.bar is None:
            self.bar = self.stack.enter_context(console.progress("training"))
        words = [f"step {now.step:,}" + (f" of {now.steps:,}" if now.steps else "")]
        if now.loss is not None:
            words.append(f"loss {now.loss:.3f}")
        if now.held_out is not None:
            words.append(f"held-out {now.held_out.bits_per_byte:.3f} bits per byte")
        if now.tokens_per_second is not None:
            words.append(f"{console.count(now.tokens_per_second)} tokens/s")
        if now.seconds_left is not None and now.steps is None:
            words.append(f"{console.duration(now.seconds_left)} left")
        words.append(f"peak {console.size(now.peak_memory_bytes)}")
        if now.activity != "training":
            words.append(now.activity)
        self.bar(now.step, ", ".join(words), total=now.steps)


def _tell(folder: Path, model: LanguageModel, result: Result) -> dict[str, object]:
    """The result for a person, and for a program."""
    parameters = sum(p.numel() for p in model.parameters())
    shown: dict[str, object] = {}
    if (held_out := result.held_out) is not None:
        shown["held-out loss"] = f"{held_out.loss:.4f} nats per token over {held_out.tokens:,} tokens"
        shown["perplexity"] = f"{held_out.perplexity:.2f}"
        shown["bits per byte"] = f"{held_out.bits_per_byte:.4f}"
    shown["steps"] = f"{result.step:,} in {console.duration(result.seconds)}"
    shown["speed"] = f"{console.count(result.tokens_per_second)} tokens/s"
    shown["peak memory"] = console.size(result.peak_memory_bytes)
    shown["parameters"] = console.count(parameters)
    shown["run"] = folder
    console.fields(shown)
    print("Next:")
    print(f"  everlong generate {folder} --prompt TEXT")
    print(f"  everlong eval {folder} --data {read_settings(folder)['data']}")
    return {
        "run": str(folder),
        "loss": held_out and held_out.loss,
        "perplexity": held_out and held_out.perplexity,
        "bits_per_byte": held_out and held_out.bits_per_byte,
        "steps": result.step,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_bytes": result.peak_memory_bytes,
        "parameters": parameters,
    }
