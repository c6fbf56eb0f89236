"""Writes the file of a mixer of your own, which trains as it is."""

import importlib.util
import inspect
import keyword
from pathlib import Path

from tyro.conf import Positional

from everlong import mixers
from everlong.cli.places import check_free
from everlong.config import config
from everlong.data import disk
from everlong.mixers import minimal

HEADER = '''"""{title}: in one sentence, what it keeps of the past and how it reads that.

    S_t = diag(f_t) S_{{t-1}} + (1 - f_t) v_t^T          o_t = S_t^T q_t
    f_t = sigmoid(W_f x_t)      q_t = silu(W_q x_t)      y_t = W_o norm(o_t)

It begins as HGRN2, of everlong/mixers/minimal.py, and trains as it is. Make it yours from the top down:

    1. `Options`: what can be chosen about it. `width` is the model's; what cannot work is refused in `__post_init__`.
    2. `State` and `init_state`: all that it keeps of a sequence, as tensors with the sequence on axis 0.
    3. `__init__`: its parameters. Projections called q, k, v, o and gate are found by name, by LoRA for one.
    4. `forward`: the work. Give `cu_seqlens` and `form` on to the operators, and padding, packing and all forms follow.
    5. `traits`: what it can do, as the laws will measure it.
    6. `reference`: the same as a loop over tokens without any operator of everlong, which the laws compare it with.
    7. `cost`: its FLOPs, bytes and parameters in numbers; the laws count after.

Then put equations, sizes and source here, for `everlong explain` shows this text.

Shapes    x [B, T, D] -> y [B, T, D];  q, f, v [B, T, H, K], H K = D
State     S [B, H, K, K]: 4 H K^2 bytes a sequence, whatever its length
Cost      FLOPs a token: 8 D^2 for the projections + 4 H K^2 for the memory
Source    who published it, when, where
Deviates  what is done otherwise, and why
"""
'''


@config
class Arguments:
    """Writes the file of a mixer of your own, which trains as it is.

    Example: everlong new-mixer my_mixer
    """

    name: Positional[str]
    """Its name, such as my_mixer: that of the file."""
    out: Path = Path(".")
    """The folder to write it to."""


def run(arguments: Arguments) -> dict[str, object]:
    """Writes the file and tells what to type next."""
    name, path = check_name(arguments.name), arguments.out / f"{arguments.name}.py"
    if path.exists():
        raise ValueError(f"`{path}` is there already: choose another name, or remove it")
    found = importlib.util.find_spec(name)
    if found is not None and found.origin is not None:  # which is what an import would give in the place of this file
        raise ValueError(f"`{name}` is a module already, {found.origin}: choose another name")
    check_free(arguments.out)
    arguments.out.mkdir(parents=True, exist_ok=True)
    disk.write(path, skeleton(name).encode())
    called = f"{name}:{class_name(name)}"
    where = "" if arguments.out.absolute() == Path.cwd() else f"cd {arguments.out} && "
    print(f"{path} holds a mixer that trains as it is. What to change in it stands at its top; try it with")
    print(f"  {where}everlong explain {called}")
    print(f"  {where}everlong train --data python-stdlib --mixer {called} --minutes 2 --out runs/{name}")
    print("and check it by the laws of every mixer, in a checkout of everlong:")
    print(f"  PYTHONPATH={arguments.out.resolve()} pytest tests/mixers/test_laws.py --mixer {called}")
    return {"file": str(path), "mixer": called}


def check_name(name: str) -> str:
    """The name; ValueError where it cannot be that of a file of Python, or is taken."""
    if not (name.isidentifier() and name == name.lower()) or keyword.iskeyword(name):
        raise ValueError(f"`NAME` must be lower-case letters, digits and underscores, as in my_mixer: got `{name}`")
    if name in mixers.names():
        raise ValueError(f"`{name}` is a mixer of everlong: choose another name")
    return name


def class_name(name: str) -> str:
    """`my_mixer` as `MyMixer`."""
    return "".join(word.capitalize() for word in name.split("_")) or "Mine"


def skeleton(name: str) -> str:
    """The file of the smallest mixer, under this name and with a header that says what to change."""
    source, header = inspect.getsource(minimal), inspect.getsource(minimal).partition('"""\n\n')[0] + '"""\n'
    assert source.startswith(header)
    title = name.replace("_", " ").capitalize()
    body = source.removeprefix(header).replace("class Minimal(", f"class {class_name(name)}(")
    return HEADER.format(title=title) + body.replace("HGRN2", name)
