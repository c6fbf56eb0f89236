"""A newcomer's path: the guide runs as it stands, and a mixer that is one file outside of everlong does what all do."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from everlong import mixers
from everlong.cli import main, new_mixer
from everlong.mixers.minimal import Minimal

GUIDE = Path(__file__).parents[2] / "docs" / "new_mixer.md"


def test_the_guide_runs_and_builds_the_minimal_mixer(monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    module = types.ModuleType("guided")
    monkeypatch.setitem(sys.modules, "guided", module)
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), vars(module))
    ours = Minimal(Minimal.Config(width=24, num_heads=3))
    built = module.Mine(module.Options(width=24, num_heads=3))
    built.load_state_dict(ours.state_dict())
    x = torch.randn(2, 70, 24)
    assert torch.equal(built(x)[0], ours(x)[0])
    assert built.cost(built.config, 5) == ours.cost(ours.config, 5)


def command(folder, *words):
    """A command as a user types it, in that folder; its result."""
    place = Path(sys.executable).parent / "everlong"
    return json.loads(process(folder, place, *words, "--json").splitlines()[-1])


def process(folder, *words):
    """What a process of its own prints in that folder; it finds the packages in the folder's neighbour `packages`."""
    paths = [Path(__file__).parents[2], folder.parent / "packages"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not (Path(sys.executable).parent / "everlong").exists(), reason="pip install -e . first")
def test_a_mixer_of_ones_own_from_its_file_to_a_text(tmp_path):
    """In processes of their own: written, explained, trained, gone on with, evaluated, read and asked for a text.

    The first command finds it in the current folder, the others as a package somewhere else.
    """
    here, elsewhere = tmp_path / "here", tmp_path / "packages" / "somebodys"
    for folder in (here, elsewhere):
        folder.mkdir(parents=True)
    made = command(here, "new-mixer", "my_mixer")
    assert made == {"file": "my_mixer.py", "mixer": "my_mixer:MyMixer"}
    explained = command(here, "explain", "my_mixer:MyMixer")
    assert explained["classes"][0] == "my_mixer.MyMixer"
    assert "Make it yours" in explained["header"]
    (here / "my_mixer.py").rename(elsewhere / "my_mixer.py")
    name = "somebodys.my_mixer:MyMixer"
    (here / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    options = ["--out", "run", "--steps", "6", "--checkpoint-every", "3"]
    shape = ["--width", "16", "--num-layers", "2", "--length", "32", "--batch-tokens", "64", "--vocab-size", "257"]
    mixed = ["--layers", f"{name}:num_heads=2,attention"]
    trained = command(here, "train", "--data", "text.txt", *mixed, *shape, *options, "--compile", "off")
    assert trained["steps"] == 6
    resumed = command(here, "train", "--out", "run", "--resume", "--steps", "9")
    assert resumed["steps"] == 9
    assert command(here, "explain", "run")["config"]["layers"][0]["mixer"] == name
    assert command(here, "eval", "run", "--data", "run/data")["loss"] > 0
    assert command(here, "generate", "run", "--prompt", "the", "--max-new-tokens", "5")
    loading = "import everlong; everlong.load('run').save('copy'); print(everlong.load('copy').blocks[0].mixer.config)"
    assert "num_heads=2" in process(here, sys.executable, "-c", loading)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("attention", "`attention` is a mixer of everlong: choose another name"),
        ("my-mixer", "must be lower-case letters, digits and underscores, as in my_mixer: got `my-mixer`"),
        ("class", "must be lower-case letters, digits and underscores, as in my_mixer: got `class`"),
        ("json", "`json` is a module already, .*: choose another name"),
        ("torch", "`torch` is a module already, .*: choose another name"),
        ("mine", "is there already: choose another name, or remove it"),
    ],
)
def test_a_name_that_cannot_be_is_refused(name, told, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("mine")
    assert main.main(["new-mixer", name]) == 2
    assert re.search(told, capsys.readouterr().err)
    assert Path("mine.py").read_text() == "mine"


def test_the_skeleton_is_the_minimal_mixer(tmp_path, monkeypatch):
    (tmp_path / "some_new_one.py").write_text(new_mixer.skeleton("some_new_one"))
    monkeypatch.syspath_prepend(tmp_path)
    written = mixers.load("some_new_one:SomeNewOne")
    ours, theirs = Minimal(Minimal.Config(width=24)), written(written.Config(width=24))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 9, 24)
    assert torch.equal(ours(x)[0], theirs(x)[0])
    assert "HGRN2" not in Path(tmp_path / "some_new_one.py").read_text().partition('"""\n\n')[2]
