"""What a run begins with and what it goes on with: weights, tokenizer, data and settings, wherever they are now."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from everlong.config import from_dict
from everlong.data.loader import Dataset
from everlong.data.packing import FILE as DATASET
from everlong.data.tokenizer import Tokenizer
from everlong.mixers.base import sees_ahead
from everlong.models import run as runs
from everlong.models.lm import LanguageModel, ModelConfig
from everlong.train import checkpoint
from everlong.train import folder as places
from everlong.train.checkpoint import Found
from everlong.train.settings import TrainConfig

Tell = Callable[[str], object]

BYTES_A_PARAMETER = 12  # weight, gradient and one moment of the optimizer, in float32


def origin_of(init: Path, folder: Path) -> LanguageModel:
    """The model whose weights a run in `folder` is to begin with.

    Raises:
        ValueError: it is no run, or the very folder that is to be written.
    """
    if init.resolve() == folder.resolve():
        raise ValueError(f"--init and --out are both {folder}: a run is left as it is, so choose another --out")
    return runs.load(init)


def describe(init: Path, model: LanguageModel) -> dict[str, str]:
    """What a run's settings say of the run that it began with."""
    return {"run": str(init.resolve()), "weights": checkpoint.fingerprint(model)}


def tokenizer_of(init: Path) -> Tokenizer:
    """The tokenizer that a model was trained with.

    Raises:
        ValueError: there is none, or it has tokens that the model does not know.
    """
    try:
        return runs.load_tokenizer(init)
    except ValueError as error:
        raise ValueError(f"--init needs a run with its tokenizer, by which --data is read: {error}") from None


def check_trainable(shape: ModelConfig, settings: TrainConfig) -> None:
    """Raises ValueError where a model of this shape cannot be trained so, or has no room in memory."""
    if (limit := shape.position_limit) is not None and settings.length > limit:
        raise ValueError(
            f"`length` must be at most the model's learned positions: got length={settings.length}, "
            f"learned_positions={limit}"
        )
    if shape.embedding_looks_ahead:
        raise ValueError(
            f"positions={shape.positions} show tokens those that they are to predict: take one that is causal"
        )
    for mixer, options in map(shape.mixer, shape.layers):
        if (found := sees_ahead(mixer, options)) is not None:
            layer, way = found
            raise ValueError(f"{layer} sees the tokens that it is to predict: {way}")
    period = min(shape.num_layers, len(shape.layers))
    with torch.device("meta"):
        model = LanguageModel(dataclasses.replace(shape, num_layers=period))
    blocks, others = (sum(p.numel() for p in part.parameters()) for part in (model.blocks, model.embedding))
    parameters = others + blocks * shape.num_layers // period
    needed, there = BYTES_A_PARAMETER * parameters, psutil.virtual_memory().total
    if needed > there:
        raise ValueError(
            f"a model of {parameters:,} parameters takes at least {needed / 1e9:,.0f} GB while it is "
            f"trained: this machine has {there / 1e9:,.0f} GB. Take a smaller --width, --num-layers or --vocab-size"
        )


def first_model(shape: ModelConfig, seed: int) -> LanguageModel:
    """A model with random weights, the same ones for the same seed."""
    torch.manual_seed(seed)
    return LanguageModel(shape)


def recorded(folder: Path, found: Found, data: str | None, tell: Tell) -> dict[str, Any]:
    """How the run was set up; where that is damaged, a checkpoint knows all of it but where the data is.

    Raises:
        ValueError: nothing says how, or where.
    """
    try:
        return places.read_settings(folder)
    except ValueError as error:
        if found.checkpoint is None:
            raise
        if data is None:
            raise ValueError(f"{error}; its checkpoints can be gone on from if --data says where the data is") from None
        tell(f"{error}; taking the settings of {found.checkpoint.path}")
        state = found.checkpoint.state
        return {"data": data, "model": state["model"], "train": state["config"]}


def same_data(folder: Path, settings: Mapping[str, Any], data: str | None) -> Dataset:
    """The data that the run was begun on, also where it or the run was moved: `data` where that is given and prepared.

    Raises:
        ValueError: it is gone, or is other data now.
    """
    given = [] if data is None else [Path(data)]
    candidates = [*given, Path(settings["data"]), folder / places.DATA]
    place = next((candidate for candidate in candidates if (candidate / DATASET).is_file()), None)
    if place is None:
        raise ValueError(f"the run's data is not at {settings['data']} any more: say by --data where it is now")
    dataset = Dataset.open(place)
    if settings.get("data_fingerprint", dataset.info.fingerprint) != dataset.info.fingerprint:
        raise ValueError(f"{place} is not the data that {folder} is trained on: say by --data where that is")
    return dataset


def model_of(folder: Path, settings: Mapping[str, Any], found: Found, tell: Tell) -> LanguageModel:
    """The model of a run, to be filled from its checkpoint; where there is none yet, as the run began with it.

    Raises:
        ValueError: there are only damaged checkpoints, or the weights that it began with are gone.
    """
    shape, init = from_dict(ModelConfig, settings["model"]), settings.get("init")
    if found.checkpoint is not None:
        tell(f"going on from {found.checkpoint.path}")
        return LanguageModel(shape)
    if found.damaged:
        raise ValueError(f"{folder} has no whole checkpoint to go on from: start again with --overwrite")
    if places.holds_model(folder):
        raise ValueError(
            f"{folder} has its model but no checkpoint to go on from: begin a new run with its weights by "
            f"--init {folder} --out ANOTHER"
        )
    tell(f"{folder} has no checkpoint yet: it begins again")
    if init is None:
        return first_model(shape, settings["train"]["seed"])
    if not (Path(init["run"]) / runs.CONFIG).is_file():
        raise ValueError(f"{folder} has no checkpoint yet, and {init['run']}, with whose weights it began, is gone")
    model = runs.load(init["run"])
    if checkpoint.fingerprint(model) != init["weights"]:
        raise ValueError(f"{init['run']} has other weights than when {folder} began with them: start a new run")
    return model
