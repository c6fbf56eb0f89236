"""Checkpoints of RWKV 4, 5.2, 6 and 7: the released trainer's state dicts (.pth, .safetensors), and rwkv.cpp's files.

    everlong.interop.rwkv.load("RWKV-x070-World-0.1B.pth").save("run")

The names of the tensors tell the version. rwkv.cpp, whose format is in its docs/FILE_FORMAT.md, keeps some tensors
turned, or as what is computed of them: `read` gives them as the trainer has them. It runs version 5.2 with 1e-5 in the
norm of the heads; here it is 64e-5, as in the authors' own program. The ids of the tiny models of its tests are bytes.
"""

import math
import mmap
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from everlong.config import from_dict
from everlong.data.disk import replacing
from everlong.data.tokenizer import one_line
from everlong.models.lm import Block, LanguageModel, ModelConfig

Version = Literal["4", "5.2", "6", "7"]
Weights = dict[str, Tensor]


class Pair(NamedTuple):
    """A tensor of a layer under the trainer's name and under ours, and how one becomes the other."""

    theirs: str
    ours: str
    form: Literal["same", "vector", "flat", "heads", "turned"] = "same"
    """"vector": theirs is [1, 1, D]; "flat": [D] of our [H, N]; "heads": [H, N] of our [D]; "turned": transposed."""
    row: int | None = None
    """The row that it is in ours."""
    complement: bool = False
    """Theirs is 1 minus ours: the weight of the token itself, not of the one before."""


def _rows(prefix: str, names: str, ours: str, *, complement: bool = False) -> list[Pair]:
    return [Pair(prefix + name, ours, "vector", i, complement) for i, name in enumerate(names.split())]


def _linears(**names: str) -> list[Pair]:
    return [Pair(f"att.{theirs}.weight", f"{ours}.weight") for theirs, ours in names.items()]


def _low_rank(theirs: str, ours: str) -> list[Pair]:
    return [Pair(f"{theirs}1", f"{ours}.down.weight", "turned"), Pair(f"{theirs}2", f"{ours}.up.weight", "turned")]


_COMMON = [
    *(
        Pair(f"{theirs}.{part}", f"{ours}.{part}")
        for theirs, ours in (("ln1", "norm"), ("ln2", "feed_forward.norm"))
        for part in ("weight", "bias")
    ),
    *_linears(key="k", value="v", output="o"),
    Pair("ffn.key.weight", "feed_forward.up.weight"),
    Pair("ffn.value.weight", "feed_forward.down.weight"),
]
_FIRST = [Pair(f"ln0.{part}", f"embedding_norm.{part}") for part in ("weight", "bias")]
_HEADS = [Pair(f"att.ln_x.{part}", f"group_norm.{part}", "flat") for part in ("weight", "bias")]
_GATED = Pair("ffn.receptance.weight", "feed_forward.gate.weight")
_FADED = [*_linears(receptance="q", gate="gate"), _GATED, *_HEADS, Pair("att.time_faaaa", "bonus")]

LAYERS: dict[Version, list[Pair]] = {
    "4": [
        *_COMMON,
        *_linears(receptance="gate"),
        _GATED,
        Pair("att.time_decay", "decay"),
        Pair("att.time_first", "bonus"),
        *_rows("att.time_mix_", "k v r", "mix", complement=True),
        *_rows("ffn.time_mix_", "k r", "feed_forward.mix", complement=True),
    ],
    "5.2": [
        *_COMMON,
        *_FADED,
        Pair("att.time_decay", "log_rate", "heads"),
        *_rows("att.time_mix_", "k v r g", "mix", complement=True),
        *_rows("ffn.time_mix_", "k r", "feed_forward.mix", complement=True),
    ],
    "6": [
        *_COMMON,
        *_FADED,
        Pair("att.time_maa_x", "mix_base", "vector"),
        *_rows("att.time_maa_", "w k v r g", "mix"),
        Pair("att.time_maa_w1", "mix_down.weight", "turned"),
        Pair("att.time_maa_w2", "mix_up"),
        Pair("att.time_decay", "decay.base", "vector"),
        *_low_rank("att.time_decay_w", "decay"),
        *_rows("ffn.time_maa_", "k r", "feed_forward.mix"),
    ],
    "7": [
        *_COMMON,
        *_linears(receptance="q"),
        *_HEADS,
        *_rows("att.x_", "r w k v a g", "mix"),
        *_rows("ffn.x_", "k", "feed_forward.mix"),
        Pair("att.w0", "decay.base", "vector"),
        Pair("att.a0", "rate.base", "vector"),
        *_low_rank("att.w", "decay"),
        *_low_rank("att.a", "rate"),
        *_low_rank("att.g", "gate"),
        Pair("att.k_k", "k_scale", "vector"),
        Pair("att.k_a", "k_rate", "vector"),
        Pair("att.r_k", "bonus"),
    ],
}
_SHARE = [Pair("att.v0", "share.base", "vector"), *_low_rank("att.v", "share")]  # version 7, all layers but the first
_OUTSIDE = {"emb.weight": "embedding.weight", "head.weight": "head.weight"}
_OUTSIDE |= {"ln_out.weight": "norm.weight", "ln_out.bias": "norm.bias"}


def read(path: str | Path) -> Weights:
    """The tensors of a checkpoint, under the trainer's names and in its shapes, in the type that the file has.

    Raises:
        ValueError: there is no such file, or it is damaged, quantised, or no checkpoint of RWKV.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder: give the file inside of it" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {what}. A checkpoint of RWKV is a .pth, .safetensors or rwkv.cpp's .bin")
    with path.open("rb") as file:
        start = file.read(4)
    if start == _MAGIC:
        weights = _untwisted(dict(_tensors(path)), path)
    elif start == b"GGUF":
        raise ValueError(f"{path} is a GGUF file, which is not read as RWKV: give the .pth that it was made of")
    elif path.suffix == ".safetensors":
        try:
            weights = load_file(path)
        except (SafetensorError, ValueError, KeyError) as error:
            raise ValueError(f"{path} is damaged: {one_line(error)}. Copy or download it again") from None
    else:
        weights = _state_dict(path)
    version(weights, str(path))
    return weights


def version(weights: Mapping[str, Tensor], source: str = "the checkpoint") -> Version:
    """Of which version these tensors are, by their names.

    Raises:
        ValueError: of none that is read.
    """
    if "emb.weight" not in weights or "blocks.0.att.key.weight" not in weights:
        listed = ", ".join(sorted(weights)[:3])
        raise ValueError(
            f"{source} is no checkpoint of RWKV: it lacks `emb.weight` or `blocks.0.att.key.weight`"
            f"{f' and begins with {listed}' if listed else ''}. Give one in the names of the released trainer"
        )
    if "blocks.0.att.r_k" in weights:
        return "7"
    if "blocks.0.att.time_maa_x" in weights:
        return "6"
    if "blocks.0.att.ln_x.weight" not in weights:
        return "4"
    decay = weights.get("blocks.0.att.time_decay")
    if "blocks.0.att.gate.weight" in weights and decay is not None and decay.dim() > 1 and decay.shape[1] > 1:
        return "5.2"
    raise ValueError(f"{source} is of RWKV 5.0 or 5.1, which are not read: versions 4, 5.2, 6 and 7 are")


def load(path: str | Path) -> LanguageModel:
    """The model of a checkpoint, in float32; `save` of it writes a run.

    Raises:
        ValueError: as `read` does, and where tensors are missing, unknown, or do not fit each other.
    """
    return from_weights(read(path), str(path))


def from_weights(weights: Mapping[str, Tensor], source: str = "the checkpoint") -> LanguageModel:
    """The model of a state dict in the trainer's names.

    Raises:
        ValueError: tensors are missing, unknown, or do not fit each other.
    """
    kind = version(weights, source)
    config = shape(weights, kind, source)
    with torch.device("meta"):  # no weights are drawn that are about to be replaced
        model = LanguageModel(config)
    expected, left, found = model.state_dict(), set(weights), {name: list[Tensor]() for name in model.state_dict()}
    for pair, ours in _pairs(kind, config.num_layers):
        left.discard(pair.theirs)
        found[ours].append(_to_ours(pair, weights[pair.theirs], expected[ours], source))
    if kind == "7":  # the trainer keeps these of the first layer too, and never uses them
        left -= {f"blocks.0.att.v{part}" for part in range(3)}
    if left:
        listed = sorted(left)
        raise ValueError(
            f"{source} has {len(left)} tensors that RWKV {kind} does not have: {', '.join(listed[:3])}"
            f"{', ...' if listed[3:] else ''}. It is of a variant that is not read"
        )
    joined = {
        name: torch.stack(rows) if expected[name].dim() > rows[0].dim() else rows[0] for name, rows in found.items()
    }
    model.load_state_dict(joined, assign=True)
    return model.eval()


def shape(weights: Mapping[str, Tensor], kind: Version, source: str = "the checkpoint") -> ModelConfig:
    """The shape of the model whose weights these are.

    Raises:
        ValueError: a tensor is missing, or the sizes make no model.
    """
    depth = len({found[1] for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))})
    missing = [pair.theirs for pair, _ in _pairs(kind, depth) if pair.theirs not in weights]
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} tensors of RWKV {kind}: {', '.join(missing[:3])}"
            f"{', ...' if missing[3:] else ''}. It is cut short, or of a variant that is not read"
        )

    def size(name: str, axis: int) -> int:
        tensor = weights[name]
        if tensor.dim() != 2:
            raise ValueError(f"{source}: `{name}` must have two axes, got {list(tensor.shape)}: it is damaged")
        return tensor.shape[axis]

    layer: dict[str, Any] = {"mixer": f"rwkv{'6' if kind == '5.2' else kind}"}
    layer["feed_forward"] = size("blocks.0.ffn.key.weight", 0)
    if kind == "7":
        layer |= {f"{name}_rank": size(f"blocks.0.att.{label}1", 1) for name, label in _RANKS.items()}
        if depth > 1:
            layer["value_rank"] = size("blocks.1.att.v1", 1)
    elif kind == "6":
        layer["mix_rank"] = size("blocks.0.att.time_maa_w1", 1) // 5
        layer["decay_rank"] = size("blocks.0.att.time_decay_w1", 1)
    elif kind == "5.2":
        layer["variant"] = "eagle"
    if kind != "4":
        layer["num_heads"] = size("blocks.0.att.r_k" if kind == "7" else "blocks.0.att.time_faaaa", 0)
    try:
        sizes = {"vocab_size": size("emb.weight", 0), "width": size("emb.weight", 1), "num_layers": depth}
        return from_dict(ModelConfig, {**sizes, "layers": (layer,), "tie_embeddings": False, "norm": "layer"})
    except ValueError as error:
        raise ValueError(f"{source} has sizes that make no model: {error}. It is damaged") from None


def state_dict(model: LanguageModel) -> Weights:
    """The model's tensors under the trainer's names and in its shapes: what `from_weights` takes.

    Raises:
        ValueError: the model is none that RWKV's own programs can run.
    """
    config, mixers = model.config, [block.mixer for block in cast(Iterable[Block], model.blocks)]
    kinds = {_kind(mixer) for mixer in mixers}
    kind = kinds.pop()
    epsilons = (config.norm_eps, getattr(mixers[0].config, "group_norm_eps", 64e-5))
    if kinds or kind is None or config.norm != "layer" or config.block != "pre" or model.positions:
        raise ValueError(
            "only a model of one version of RWKV can be written in its names, with norm='layer', block='pre' and no "
            f"positions: got layers={list(config.layers)}, norm={config.norm!r}, block={config.block!r}, "
            f"positions={config.embedding_positions}"
        )
    if epsilons != (1e-5, 64e-5):
        raise ValueError(
            "RWKV's own programs know no other norms than those of norm_eps=1e-05 and group_norm_eps=0.00064: "
            f"got norm_eps={epsilons[0]}, group_norm_eps={epsilons[1]}"
        )
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    heads = getattr(mixers[0].config, "heads", 1)
    return {pair.theirs: _to_theirs(pair, weights[ours], heads) for pair, ours in _pairs(kind, config.num_layers)}


def write(model: LanguageModel, path: str | Path) -> None:
    """Writes a checkpoint in the trainer's names: `.safetensors` by that suffix, otherwise as torch saves it.

    Raises:
        ValueError: the model is none that RWKV's own programs can run.
    """
    path, weights = Path(path), state_dict(model)
    with replacing(path) as aside:
        if path.suffix == ".safetensors":
            save_file(weights, aside, metadata={"format": "pt"})
        else:
            torch.save(weights, aside)


_RANKS = {"decay": "w", "rate": "a", "gate": "g"}


def _kind(mixer: Any) -> Version | None:
    name = type(mixer).__module__.rpartition(".")[2]
    if name == "rwkv6":
        return "5.2" if mixer.config.variant == "eagle" else "6"
    kinds: dict[str, Version] = {"rwkv4": "4", "rwkv7": "7"}
    return kinds.get(name)


def _pairs(kind: Version, depth: int) -> Iterator[tuple[Pair, str]]:
    """Every tensor of a model: the trainer's name with how to turn it, and ours."""
    for theirs, ours in _OUTSIDE.items():
        yield Pair(theirs, ours), ours
    for layer in range(depth):
        own = _FIRST if layer == 0 else _SHARE if kind == "7" else []
        for pair in (*LAYERS[kind], *own):
            yield pair._replace(theirs=f"blocks.{layer}.{pair.theirs}"), f"blocks.{layer}.mixer.{pair.ours}"


def _to_ours(pair: Pair, value: Tensor, like: Tensor, source: str) -> Tensor:
    """A tensor of theirs as ours; a row where ours has several."""
    wanted = like.shape[1:] if pair.row is not None else like.shape
    value = value.to(torch.float32, copy=True)  # the model shares no memory with a dict or a file
    value = value.T if pair.form == "turned" and value.dim() == 2 else value
    if [n for n in value.shape if n > 1] != [n for n in wanted if n > 1] and not (
        pair.form in ("flat", "heads") and value.numel() == wanted.numel()
    ):
        raise ValueError(
            f"{source}: `{pair.theirs}` must be {list(wanted)} to fit the others, got {list(value.shape)}. "
            "It is damaged, or of a variant that is not read"
        )
    value = value.reshape(wanted)
    return (1 - value if pair.complement else value).contiguous()


def _to_theirs(pair: Pair, value: Tensor, heads: int) -> Tensor:
    value = value if pair.row is None else value[pair.row]
    value = 1 - value if pair.complement else value
    if pair.form == "vector":
        value = value.view(1, 1, -1)
    elif pair.form == "flat":
        value = value.flatten()
    elif pair.form == "heads":
        value = value.view(heads, -1)
    elif pair.form == "turned":
        value = value.T
    return value.clone(memory_format=torch.contiguous_format)


def _state_dict(path: Path) -> Weights:
    """What torch has saved, if it is nothing but tensors by name."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # pickle, zipfile and torch each have their own
        raise ValueError(
            f"{path} is no checkpoint that torch can read ({one_line(error)[:120]}). "
            "Give a .pth, a .safetensors or rwkv.cpp's .bin, copied whole"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds more than tensors by name: give the model's state dict alone")
    return {str(name): value for name, value in found.items()}


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


_MAGIC = struct.pack("<i", 0x67676D66)
_TYPES: dict[int, type[np.generic]] = {0: np.float32, 1: np.float16}
_QUANTISED = {2: "Q4_0", 3: "Q4_1", 7: "Q5_0", 8: "Q5_1", 9: "Q8_0"}


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file of rwkv.cpp as they stand there, and a look at whether it is whole."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        place = 0

        def take(count: int, what: str) -> bytes:
            nonlocal place
            if count < 0 or place + count > len(data):
                raise ValueError(
                    f"{path} ends inside of {what}, after {len(data):,} bytes: it is cut short or damaged. "
                    "Copy or download it again"
                )
            place += count
            return data[place - count : place]

        _, layout, vocab, width, depth, _ = struct.unpack("<6i", take(24, "its header"))
        if layout not in (100, 101):
            raise ValueError(f"{path} is of version {layout} of rwkv.cpp's format: 100 and 101 are read")
        names = set()
        while place < len(data):
            axes, length, kind = struct.unpack("<3i", take(12, "a tensor's header"))
            if not (1 <= axes <= 4 and 1 <= length <= 256):
                raise ValueError(f"{path} is damaged before byte {place:,}: no tensor begins there. Copy it again")
            sizes = struct.unpack(f"<{axes}i", take(4 * axes, "a tensor's sizes"))
            name = take(length, "a tensor's name").decode("latin-1")
            if not re.fullmatch(r"[\w.]+", name, re.ASCII):
                raise ValueError(f"{path} is damaged before byte {place:,}: no tensor has that name. Copy it again")
            if kind in _QUANTISED:
                raise ValueError(
                    f"{path} is quantised ({_QUANTISED[kind]}): convert the .pth to FP16 or FP32 for it, or read that"
                )
            if kind not in _TYPES or min(sizes) < 1 or name in names:
                raise ValueError(f"{path} is damaged at the tensor {name!r} before byte {place:,}. Copy it again")
            dtype = np.dtype(_TYPES[kind]).newbyteorder("<")
            values = np.frombuffer(take(math.prod(sizes) * dtype.itemsize, f"the tensor `{name}`"), dtype=dtype)
            names.add(name)
            yield name, torch.from_numpy(values.reshape(sizes[::-1]).astype(_TYPES[kind]))
            if name == "emb.weight" and sizes != (width, vocab):
                raise ValueError(
                    f"{path} is damaged: its header and its embedding are of different sizes. Copy it again"
                )
        if f"blocks.{depth - 1}.ln1.weight" not in names or "head.weight" not in names:
            raise ValueError(f"{path} is cut short: its header tells of {depth} layers. Copy or download it again")


def _untwisted(weights: Weights, path: Path) -> Weights:
    """rwkv.cpp's tensors as the trainer has them."""
    kind = version(weights, str(path))
    found: Weights = {}
    for name, value in weights.items():
        part = name.rpartition(".")[2]
        if part == "x_rwkvag":
            if len(value) != 6:
                raise ValueError(f"{path}: `{name}` must have 6 rows, got {list(value.shape)}: it is damaged")
            for label, row in zip("rwkvag", value, strict=True):
                found[name.replace("rwkvag", label)] = row.reshape(1, 1, -1)
            continue
        if part == "time_maa_w2" and value.dim() == 3:
            value = value.mT
        elif kind in ("6", "7") and re.fullmatch(r"(time_maa_|time_decay_|)[wavg][12]", part) and value.dim() == 2:
            value = value.T
        elif part == "time_decay" and kind in ("4", "5.2"):  # the rate, negative, or the factor of a step
            rate = -value.double() if kind == "4" else -value.double().clamp(1e-38, 1 - 2**-26).log()
            value = rate.clamp_min(1e-38).log().float()
        if (
            part in _VECTORS
            or (kind == "6" and part == "time_decay")
            or (part.startswith("time_m") and value.dim() < 2)
        ):
            value = value.reshape(1, 1, -1)
        elif part in ("time_decay", "time_faaaa") and value.dim() == 3 and value.shape[2] == 1:
            value = value[..., 0]
        found[name] = value
    return found


_VECTORS = {"w0", "a0", "v0", "k_k", "k_a", "x_k"}
