"""A run on disk: a folder in the style of Hugging Face, with the model's shape, its weights and its tokenizer."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import everlong
from everlong.config import from_dict, nearest, to_dict
from everlong.data.disk import replacing, write_json
from everlong.data.packing import FILE as DATASET
from everlong.data.tokenizer import Tokenizer
from everlong.models.lm import LanguageModel, ModelConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(model: LanguageModel, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes the model, and its tokenizer where there is one. Each file is whole at every instant."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_embeddings:
        del weights["head.weight"]
    with replacing(folder / WEIGHTS) as aside:
        save_file(weights, aside, metadata={"format": "pt"})
    description = {
        "architectures": ["EverlongForCausalLM"],
        "model_type": "everlong",
        "everlong_version": everlong.__version__,
        "dtype": str(next(iter(weights.values())).dtype).removeprefix("torch."),
        **to_dict(model.config),
    }
    generation: dict[str, Any] = {"do_sample": True, "temperature": 1.0}
    if tokenizer is not None:
        tokenizer.save(folder)
        ends = {"bos_token_id": tokenizer.end, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.end}
        description, generation = {**description, **ends}, {**generation, **ends}
    write_json(folder / "generation_config.json", generation)
    write_json(folder / CONFIG, description)  # last: a folder with it is a run


def load(folder: str | Path) -> LanguageModel:
    """Reads the model of a run folder.

    Raises:
        ValueError: the folder is no run, or its weights do not fit its config.
    """
    folder = Path(folder)
    shape = load_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}: its training has not saved a model yet")
    model = LanguageModel(shape)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}") from None
    fill(model, weights, str(folder / WEIGHTS))
    return model.eval()


def load_config(folder: str | Path) -> ModelConfig:
    """The shape of the model in a run folder; ValueError where the folder is no run."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is no run: {_what_instead(Path(folder))}")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(description, dict):
        raise ValueError(f"{path} must be a JSON object: got {json.dumps(description)[:40]}")
    if description.get("model_type") != "everlong":
        kind = description.get("model_type", "nameless")
        raise ValueError(
            f"{path} describes a `{kind}` model: a run of everlong is needed, as `everlong train` makes it"
        )
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    beside = {"architectures", "model_type", "everlong_version", "dtype", "auto_map"}
    loose = "transformers_version" in description  # transformers keeps more than our options
    shape = {
        key: value
        for key, value in description.items()
        if key in known or not (loose or key in beside or key.endswith("_token_id"))
    }
    try:
        return from_dict(ModelConfig, shape)
    except ValueError as error:
        raise ValueError(f"{path} describes no model: {error}") from None


def _what_instead(folder: Path) -> str:
    """What stands where a run should be, and the way out."""
    if not folder.exists():
        close = nearest(folder.name, sorted(path.name for path in folder.parent.glob("*") if path.is_dir()))
        hint = f". Nearest: `{folder.parent / close}`" if close else ""
        return f"there is no such folder{hint}. `everlong train --out {folder}` makes one"
    if not folder.is_dir():
        return "it is a file. A run is a folder that `everlong train` has made"
    if (folder / DATASET).is_file():
        return f"it is prepared data. `everlong train --data {folder} --mixer NAME --out RUN` makes a run of it"
    if (folder / "training").is_dir():
        return f"its training has not saved a model yet. `everlong train --out {folder} --resume` goes on with it"
    return f"it has no {CONFIG}. `everlong train` makes runs"


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a run folder.

    Raises:
        ValueError: there is none, or it has tokens that the model does not know.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json: copy the one of the data that it was trained on into it")
    tokenizer, known = Tokenizer.load(Path(folder)), load_config(folder).vocab_size
    if tokenizer.vocab_size > known:
        raise ValueError(
            f"the tokenizer in {folder} is not that of its model: it has {tokenizer.vocab_size:,} tokens, the model "
            f"knows {known:,}. Copy the tokenizer.json of the data that it was trained on into it"
        )
    return tokenizer


def fill(model: LanguageModel, weights: Mapping[str, Tensor], source: str) -> None:
    """Copies weights into the model; ValueError names what is missing, unexpected or of another shape."""
    weights = dict(weights)
    if model.config.tie_embeddings and "embedding.weight" in weights:
        weights.setdefault("head.weight", weights["embedding.weight"])
    expected = model.state_dict()
    for kind, names in (
        ("lacks", expected.keys() - weights.keys()),
        ("has unexpected", weights.keys() - expected.keys()),
    ):
        if names:
            listed = sorted(names)
            raise ValueError(
                f"{source} {kind} {len(listed)} tensors: {', '.join(listed[:5])}{', ...' if listed[5:] else ''}. "
                "They are the weights of another model than the config's"
            )
    for name, value in expected.items():
        if value.shape != weights[name].shape:
            raise ValueError(
                f"{source}: `{name}` must be {tuple(value.shape)} by the config, got {tuple(weights[name].shape)}. "
                "They are the weights of another model"
            )
    with torch.no_grad():
        model.load_state_dict(weights)
