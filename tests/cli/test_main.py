"""The command line: exit codes, one-line errors and the JSON result, with a command made for the tests."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from everlong import __version__, cli
from everlong.cli import main as command_line
from everlong.cli.main import commands, main, summary, without_json
from everlong.cli.parsing import parse

FAKE = '''
"""Fails as it is told. The second sentence.

More.
"""

import sys

import tyro

from everlong.config import config


@config
class Arguments:
    """Fails as it is told.

    Example: everlong fail-as value
    """

    how: tyro.conf.Positional[str] = ""
    """How."""


def run(arguments):
    print("for a person")
    if arguments.how == "value":
        raise ValueError("`width` must be\\n a multiple of 8")
    if arguments.how == "file":
        open("no/such/file")
    if arguments.how == "bug":
        raise KeyError("oops")
    if arguments.how == "interrupt":
        raise KeyboardInterrupt
    if arguments.how == "signal":
        raise SystemExit(143)
    if arguments.how == "pipe":
        raise BrokenPipeError
    return {"how": arguments.how, "loss": float("nan"), "nested": {"path": [1, 2.5]}}
'''


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A command `fail-as` beside the real ones."""
    (tmp_path / "fail_as.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    yield
    sys.modules.pop("everlong.cli.fail_as", None)
    vars(cli).pop("fail_as", None)


def everlong(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "everlong", *words], capture_output=True, text=True, timeout=120, check=False, **options
    )


def test_commands_are_the_files(fake):
    there = commands()
    assert {"doctor", "explain", "fail-as", "generate", "mixers"} <= there.keys()
    assert not there.keys() & {"main", "console", "parsing"}
    assert summary(there["fail-as"]) == "Fails as it is told. The second sentence"


def test_every_command_tells_what_it_does_in_a_line():
    for name, path in commands().items():
        assert 10 < len(summary(path)) < 110, name


def test_without_words_it_tells_what_one_can_do(capsys):
    assert main([]) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) <= 10
    assert "`everlong --help` lists all commands" in told[-1]
    journey = [line.split()[1] for line in told if line.startswith("  everlong ")]
    assert journey == ["demo", "prepare", "train", "eval", "generate", "mixers", "doctor"]


def test_help_lists_all_commands(capsys):
    for words in (["--help"], ["-h"], ["help"]):
        assert main(words) == 0
        told = capsys.readouterr().out
        assert all(f"everlong {name} " in told for name in commands())
        assert len(told.splitlines()) == len(commands()) + 2
    assert main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commands"].keys() == commands().keys()


def examples():
    """Every command line in the README, in the help of a command, and in what is shown to who types nothing else."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    lines = [*command_line.JOURNEY, *re.findall(r"^ {4}(everlong .+?)(?: +#.*)?$", readme, re.MULTILINE)]
    for name in commands():
        module = command_line.importlib.import_module(f"everlong.cli.{name.replace('-', '_')}")
        found = re.findall(r"(?:^ *|: |\| )(everlong .+)$", module.Arguments.__doc__, re.MULTILINE)
        assert found, f"{name} has no example"
        lines += found
    return lines


@pytest.mark.parametrize("line", examples())
def test_every_example_is_a_command_that_can_be_given(line):
    _, name, *words = shlex.split(line)
    assert name in commands()
    module = command_line.importlib.import_module(f"everlong.cli.{name.replace('-', '_')}")
    made = parse(module.Arguments, words, program="everlong")
    if name == "train":
        for layer in made.layers or ([] if made.init else [made.mixer]):
            module.ModelConfig(vocab_size=300, layers=(module.parse_layer(layer),))


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"everlong {__version__} (torch ")
    assert main(["--version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["everlong"] == __version__


def test_the_result_for_a_person(fake, capsys):
    assert main(["fail-as", "well"]) == 0
    assert capsys.readouterr() == ("for a person\n", "")


@pytest.mark.parametrize(
    "words", [["--json", "fail-as", "well"], ["fail-as", "--json", "well"], ["fail-as", "well", "--json"]]
)
def test_the_result_for_a_program_is_all_of_standard_output(fake, capsys, words):
    assert main(words) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == {"how": "well", "loss": None, "nested": {"path": [1, 2.5]}}
    assert told.out.count("\n") == 1
    assert told.err == "for a person\n"


def test_json_is_taken_out_of_options_only():
    assert without_json(["a", "--json", "--b=--json", "--", "--json"]) == (["a", "--b=--json", "--", "--json"], True)
    assert without_json(["a", "--", "--json"]) == (["a", "--", "--json"], False)


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["fail-as", "value"], 2, "everlong fail-as: `width` must be a multiple of 8\n"),
        (["fail-as", "file"], 2, "everlong fail-as: no/such/file: no such file or directory\n"),
        (["fail-as", "interrupt"], 130, "everlong fail-as: interrupted\n"),
        (["fail-as", "signal"], 143, ""),
        (["fail-as", "--hwo", "x"], 2, "everlong fail-as: unknown option `--hwo`. See `everlong fail-as --help`\n"),
        (["fail-az"], 2, "everlong: unknown command `fail-az`. Nearest: `fail-as`. There is: "),
        (["doctr", "--json"], 2, "everlong: unknown command `doctr`. Nearest: `doctor`. There is: "),
        (["--versoin"], 2, "everlong: unknown option `--versoin`. Nearest: `--version`. There is: "),
    ],
)
def test_exit_codes_and_lines(fake, capsys, words, code, line):
    assert main(words) == code
    told = capsys.readouterr().err
    assert told.startswith(line)
    assert told.count("\n") == (1 if line else 0)


def test_a_bug_keeps_its_traceback(fake):
    with pytest.raises(KeyError):
        main(["fail-as", "bug"])


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "everlong"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False
    )
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


def test_as_a_process():
    done = everlong("explian", "mamba2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("everlong: unknown command `explian`. Nearest: `explain`.")
    assert done.stderr.count("\n") == 1


def test_start_loads_nothing_heavy():
    """What a person waits for before anything can be told."""
    code = (
        "import sys; from everlong.cli.main import main; main([]);"
        "print({'torch', 'transformers', 'datasets', 'numpy', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_every_command_takes_help(capsys):
    for name in commands():
        module = command_line.importlib.import_module(f"everlong.cli.{name.replace('-', '_')}")
        assert module.Arguments.__doc__
        assert main([name, "--help"]) == 0
        told = capsys.readouterr().out
        assert "--json" in told
        assert f"everlong {name}" in told.partition("\n")[2], f"{name}: the help has no example"
