"""Trains a language model on text and leaves a run folder."""

import dataclasses
import json
import shutil
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import tyro

from everlong import mixers
from everlong.cli import console
from everlong.cli.parsing import Names
from everlong.cli.places import check_free_for_run
from everlong.config import config, from_dict, to_dict
from everlong.data import disk
from everlong.data.loader import Dataset, Loader
from everlong.data.packing import FILE as DATASET
from everlong.data.packing import Progress as Preparing
from everlong.data.packing import prepare
from everlong.data.tokenizer import Tokenizer
from everlong.models.lm import LanguageModel, Layer, ModelConfig
from everlong.nn.positions import Position
from everlong.train import beginning, checkpoint, signals
from everlong.train import folder as places
from everlong.train.checkpoint import Checkpoint
from everlong.train.loop import Progress, Result, train
from everlong.train.settings import TrainConfig

# What may be given anew with --resume: none of it changes what an update computes.
FREE = frozenset({"steps", "evaluate_every", "evaluate_tokens", "final_tokens", "checkpoint_every", "keep", "on_nan"})
SHAPE = ("width", "num_layers", "learned_positions", "positions")  # options that are the model's
NEW_DATA = ".data.new"  # where a source is prepared while the run that is overwritten still has its own


@config
class Arguments(TrainConfig):
    """Trains a language model on text and leaves a run folder.

    Example: everlong train --data python-stdlib --mixer gated_deltanet --minutes 4 --out runs/stdlib
    A hybrid: everlong train --data novel.txt --layers mamba2,mamba2,attention:window=128 --out runs/novel
    From the weights of another run: everlong train --init runs/novel --data more.txt --out runs/more
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
    learned_positions: int | None = None
    """A learned vector for each of so many positions, added to the embedding; no longer text can then be read."""
    positions: str | None = None
    """Encoding of positions that meets the embedding, with options after colons: learned:length=512, sinusoidal."""
    vocab_size: int = 4096
    """Of the tokenizer that is trained where --data is not prepared yet."""
    text_field: str = "text"
    """The field of JSONL and Parquet that holds the text."""
    init: str | None = None
    """A run or imported model to begin with: its weights, shape and tokenizer. Instead of --mixer."""
    resume: bool = False
    """Go on with the run in --out from its newest checkpoint; nothing else needs to be given."""
    overwrite: bool = False
    """Let the new run take the place of the one that --out holds."""


def run(arguments: Arguments) -> dict[str, object]:
    """Trains, and tells what came of it."""
    folder = Path(arguments.out)
    if arguments.resume and arguments.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite removes it: give one of them")
    try:
        with signals.at_once():
            if arguments.resume:
                model, dataset, settings, start = _resume(arguments, folder)
            else:
                model, dataset, settings = _begin(arguments, folder)
                start = None
            with _Display() as display:
                result = train(model, dataset, settings, folder, start=start, report=display)
    except signals.Stopped as stop:
        raise _stopped(folder, stop.number, "at once") from None
    if result.stopped_by is not None:
        raise _stopped(folder, result.stopped_by, f"after step {result.step}")
    return _tell(folder, model, result)


def _stopped(folder: Path, number: int, when: str) -> SystemExit:
    """Says in a line how to go on; how the process ends."""
    way = f"go on with: everlong train --out {folder} --resume"
    if not (folder / places.SETTINGS).is_file():
        way = "it had not begun to train: start it again"
    _note(f"everlong train: stopped by {signal.Signals(number).name} {when}; {way}")
    return SystemExit(128 + number)


def _begin(arguments: Arguments, folder: Path) -> tuple[LanguageModel, Dataset, TrainConfig]:
    """A new run: the data prepared where it is not, the model with its first weights."""
    if arguments.data is None:
        raise ValueError("needs `--data`: a prepared folder, a text file, a folder of texts, or python-stdlib")
    settings = TrainConfig(**{name: getattr(arguments, name) for name in to_dict(TrainConfig())})
    check_free_for_run(folder)
    places.check_free(folder, overwrite=arguments.overwrite)
    model, tokenizer = None, None
    init = None if arguments.init is None else Path(arguments.init)
    if init is None:
        beginning.check_trainable(_shape(arguments, arguments.vocab_size), settings)  # told before the work
    else:
        model = beginning.origin_of(init, folder)
        _check_shape(arguments, model.config, str(init))
        beginning.check_trainable(model.config, settings)
        tokenizer = beginning.tokenizer_of(init)
    dataset, made = _dataset(arguments, folder, tokenizer, settings)
    if tokenizer is not None and dataset.info.tokenizer != tokenizer.fingerprint:
        raise ValueError(
            f"{dataset.folder} was prepared with another tokenizer than that of {init}: prepare it by "
            f"everlong prepare SOURCE --tokenizer {init} --out DIR, or give the source itself as --data"
        )
    if model is None:
        model = beginning.first_model(_shape(arguments, dataset.tokenizer.vocab_size), arguments.seed)
    began = beginning.describe(init, model) if init else None
    with places.alone(folder):
        dataset = _take_place(arguments, folder, dataset)
        places.record(folder, dataset, model.config, settings, prepared_here=made, init=began)
    return model, dataset, settings


def _shape(arguments: Arguments, vocab_size: int) -> ModelConfig:
    """The shape of a new model."""
    if (arguments.mixer is None) == (not arguments.layers):
        raise ValueError("needs `--mixer NAME` or `--layers a,b,...`, one of them; `everlong mixers` lists the mixers")
    asked = {name: _asked(arguments, name) for name in SHAPE}
    return from_dict(ModelConfig, {"vocab_size": vocab_size, "layers": _layers(arguments), **asked})


def _layers(arguments: Arguments) -> tuple[Layer, ...]:
    """The mixers that were asked for, none where the run has them already."""
    return tuple(parse_layer(layer) for layer in arguments.layers or ((arguments.mixer,) if arguments.mixer else ()))


def _asked(arguments: Arguments, name: str) -> Any:
    """What an option asks for; options of an encoding of positions stand behind its name."""
    value = getattr(arguments, name)
    return parse_positions(value) if name == "positions" and value is not None else value


def _check_shape(arguments: Arguments, shape: ModelConfig, whose: str) -> None:
    """Raises ValueError where the options ask for another model than the one there is."""
    asked = _layers(arguments)
    if asked and asked != shape.layers:
        raise ValueError(f"{whose} is a run of other layers, and goes on with those: leave --mixer or --layers out")
    _changes(arguments, {name: getattr(shape, name) for name in SHAPE}, frozenset())


def _resume(arguments: Arguments, folder: Path) -> tuple[LanguageModel, Dataset, TrainConfig, Checkpoint | None]:
    """A run as it was when its newest whole checkpoint was written; from its beginning where there is none."""
    if not (folder / places.TRAINING).is_dir():
        raise ValueError(f"{folder} holds no training to go on with: there is no {places.SETTINGS}")
    with places.alone(folder):
        with console.progress(f"verifying the checkpoints of {folder}"):
            found = checkpoint.latest(folder / places.TRAINING)
        for damage in found.damaged:
            _note(damage)
        recorded = beginning.recorded(folder, found, arguments.data, _note)
        shape, before = from_dict(ModelConfig, recorded["model"]), from_dict(TrainConfig, recorded["train"])
        _check_shape(arguments, shape, str(folder))
        init = recorded.get("init")
        if arguments.init is not None and str(Path(arguments.init).resolve()) != (init or {}).get("run"):
            began = f"from {init['run']}" if init else "with random weights"
            raise ValueError(f"{folder} began {began}, not from {arguments.init}: leave --init out")
        settings = from_dict(TrainConfig, {**to_dict(before), **_changes(arguments, to_dict(before), FREE)})
        dataset = beginning.same_data(folder, recorded, arguments.data)
        model = beginning.model_of(folder, recorded, found, _note)
        made = bool(recorded.get("prepared_here", False))
        places.record(folder, dataset, shape, settings, prepared_here=made, init=init)
    return model, dataset, settings, found.checkpoint


def parse_layer(text: str) -> Layer:
    """A mixer's name with options after colons: "attention:window=128". The name may be "package.module:Class".

    An option that has options itself is given with a point: "attention:position=rope:position.base=500000".

    Raises:
        ValueError: an option is not written as key=value, or is given twice.
    """
    name, *options = text.split(":")
    if options and "=" not in options[0] and name not in mixers.names():
        name = f"{name}:{options.pop(0)}"
    values = _pairs(options, "layer", text)
    if "mixer" in values:
        raise ValueError(f"a layer has one mixer, which stands first: got `mixer={values['mixer']}` in `{text}`")
    for key in [key for key in values if "." in key]:
        owner, _, inner = key.partition(".")
        if owner not in values:
            raise ValueError(f"`{key}` is an option of what `{owner}` names: add {owner}=NAME to `{text}`")
        if not isinstance(values[owner], dict):
            values[owner] = {owner: values[owner]}
        values[owner][inner] = values.pop(key)
    return {"mixer": name, **values} if values else name


def parse_positions(text: str) -> Position:
    """An encoding of positions with options after colons: "learned:length=512".

    Raises:
        ValueError: an option is not written as key=value, or is given twice.
    """
    name, *options = text.split(":")
    return {"position": name, **_pairs(options, "position encoding", text)} if options else name


def _pairs(options: list[str], kind: str, text: str) -> dict[str, Any]:
    """Options written as key=value, each once."""
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        key = key.replace("-", "_")
        if not key or not equals:
            raise ValueError(f"an option of a {kind} is written as key=value: got `{option}` in `{text}`")
        if key in values:
            raise ValueError(f"an option of a {kind} must be given once: `{key}` is given twice in `{text}`")
        values[key] = _value(value)
    return values


def _value(text: str) -> Any:
    """A number, true, false or null where it reads as one, the text itself otherwise."""
    try:
        return json.loads({"None": "null", "True": "true", "False": "false"}.get(text, text))
    except ValueError:
        return text


def _note(line: str) -> None:
    print(line, file=sys.stderr)


def _changes(arguments: Arguments, recorded: dict[str, Any], free: frozenset[str]) -> dict[str, Any]:
    """What was given anew: not the default, and not as recorded. ValueError where that is not among `free`."""
    usual = {field.name: field.default for field in dataclasses.fields(Arguments)}
    given = {name: _asked(arguments, name) for name in recorded}
    anew = {name: value for name, value in given.items() if value not in (usual[name], recorded[name])}
    for name in anew.keys() - free:
        raise ValueError(
            f"the run was started with {name}={recorded[name]} and goes on with it: leave "
            f"--{name.replace('_', '-')} out, or start a new run"
        )
    return anew


def _dataset(
    arguments: Arguments, folder: Path, tokenizer: Tokenizer | None, settings: TrainConfig
) -> tuple[Dataset, bool]:
    """The prepared data, and whether it is the run's own: a source that is not prepared is, into the run's folder.

    What a run prepared that is to be overwritten stays until the new data is whole.

    Raises:
        ValueError: the source cannot be used, or is shorter than one sequence; what was prepared for nothing is gone.
    """
    source, place, earlier = Path(str(arguments.data)), folder / places.DATA, places.prepared_here(folder)
    if (source / DATASET).is_file():
        return _long_enough(source, settings), earlier and place.is_dir() and source.samefile(place)
    if arguments.overwrite and earlier:
        place = folder / NEW_DATA
        if place.exists():  # left by a process that was killed
            disk.remove(place)
    new = [path for path in (place, *place.parents) if not path.exists()]
    with console.progress(f"preparing {arguments.data}") as report:

        def tell(progress: Preparing) -> None:
            report(progress.done, progress.stage, total=progress.total)

        done = prepare(
            str(arguments.data),
            place,
            vocab_size=arguments.vocab_size,
            tokenizer=tokenizer,
            text_field=arguments.text_field,
            seed=arguments.seed,
            report=tell,
        )
    try:
        return _long_enough(place, settings), earlier or not done.reused
    except ValueError:
        if new:
            shutil.rmtree(new[-1])
        raise


def _long_enough(place: Path, settings: TrainConfig) -> Dataset:
    """Prepared data; ValueError where it is shorter than one sequence."""
    dataset = Dataset.open(place)
    Loader(dataset.split("train"), length=settings.length, batch_size=settings.rows)
    return dataset


def _take_place(arguments: Arguments, folder: Path, dataset: Dataset) -> Dataset:
    """Removes the run that is to be overwritten, now that nothing can be wrong with the new one; the new one's data."""
    places.check_free(folder, overwrite=arguments.overwrite)
    if arguments.overwrite:
        places.clear(folder, keep=dataset.folder)
    if dataset.folder != folder / NEW_DATA:
        return dataset
    return Dataset.open(dataset.folder.rename(folder / places.DATA))


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
            _note(now.note)
        if now.activity == "compiling" and self.activity != "compiling" and now.note is None:
            _note("compiling the model (about half a minute)")
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
    if result.skipped:
        shown["skipped"] = f"{result.skipped:,} updates whose loss or gradient was no finite number"
    shown["speed"] = f"{console.count(result.tokens_per_second)} tokens/s"
    shown["peak memory"] = console.size(result.peak_memory_bytes)
    shown["parameters"] = console.count(parameters)
    shown["run"] = folder
    console.fields(shown)
    print("Next:")
    print(f"  everlong generate {folder} --prompt TEXT")
    print(f"  everlong eval {folder} --data {places.read_settings(folder)['data']}")
    return {
        "run": str(folder),
        "loss": held_out and held_out.loss,
        "perplexity": held_out and held_out.perplexity,
        "bits_per_byte": held_out and held_out.bits_per_byte,
        "steps": result.step,
        "skipped": result.skipped,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_bytes": result.peak_memory_bytes,
        "parameters": parameters,
    }
