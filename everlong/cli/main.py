"""The command line: finds the command's file, reads its arguments, runs it, and turns what goes wrong into one line.

A command is a file beside this one, with a config `Arguments` whose docstring is its help, and a function
`run(arguments)` that prints for a person and returns the result for `--json`.
"""

import ast
import importlib
import importlib.metadata
import os
import pkgutil
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from everlong import __version__, cli
from everlong.cli import console
from everlong.cli.parsing import one_line, parse
from everlong.config import unknown
from everlong.train import signals
from everlong.train.memory import keep_freed_memory

NO_COMMANDS = frozenset({"console", "main", "parsing", "places"})
NO_MEMORY = "can't allocate memory"  # how torch's allocator says it, in a plain RuntimeError


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command; what the process should exit with.

    0: done. 2: the input is at fault, told in one line on standard error. 130: interrupted, 143: by SIGTERM.
    141: nobody reads the output any more. Any other exception is a bug of ours, and keeps its traceback.
    """
    words = list(sys.argv[1:] if words is None else words)
    try:
        code = _run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes standard output once more at its end, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _run(words: list[str]) -> int:
    words, as_json = without_json(words)
    if not words:
        return _journey(as_json)
    name = words[0]
    if name in {"-h", "--help", "help"}:
        return _overview(as_json)
    if name == "--version":
        return _version(as_json)
    program = f"everlong {name}"
    try:
        if name.startswith("-"):
            program = "everlong"
            raise unknown("option", name, ["--help", "--json", "--version"])
        if name not in commands():
            program = "everlong"
            raise unknown("command", name, commands())
        share_processors()
        find_mixers_here()
        module = importlib.import_module(f"everlong.cli.{name.replace('-', '_')}")
        result = _call(module, parse(module.Arguments, words[1:], program=program), as_json)
    except SystemExit as end:  # the help was asked for
        return int(end.code or 0)
    except KeyboardInterrupt as stop:
        print(f"{program}: interrupted", file=sys.stderr)
        return 128 + (stop.number if isinstance(stop, signals.Stopped) else signal.SIGINT)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"{program}: {one_line(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or NO_MEMORY in str(error)):
            raise
        print(f"{program}: there is not enough memory for this: take a smaller model, batch or length", file=sys.stderr)
        return 2
    if as_json:
        console.emit_json(result)
    return 0


def share_processors() -> None:
    """Lets torch's threads sleep sooner while they wait for each other.

    GNU OpenMP spins for milliseconds by default. Where another process needs a core as well, each wait then takes a
    whole time slice: a training step beside one busy process was measured to take more than four times as long.
    It is read when torch is loaded; whoever has set a value keeps it.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def find_mixers_here() -> None:
    """Lets "package.module:Class" name a file in the current folder, which an installed command would not see.

    Its files come last, so that none of them takes the place of a library.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _call(module: Any, arguments: Any, as_json: bool) -> dict[str, object]:
    keep_freed_memory()
    with signals.at_once():
        if not as_json:
            return module.run(arguments)  # type: ignore[no-any-return]
        with redirect_stdout(sys.stderr):  # whatever prints, a library too: standard output holds the one object
            return module.run(arguments)  # type: ignore[no-any-return]


def without_json(words: Sequence[str]) -> tuple[list[str], bool]:
    """The words without `--json`, and whether it was among them; what follows a `--` is left alone."""
    end = list(words).index("--") if "--" in words else len(words)
    before = [word for word in words[:end] if word != "--json"]
    return [*before, *words[end:]], len(before) < end


def commands() -> dict[str, Path]:
    """The commands by name, found by their files."""
    return {
        module.name.replace("_", "-"): Path(module.module_finder.path, f"{module.name}.py")  # type: ignore[union-attr]
        for module in sorted(pkgutil.iter_modules(cli.__path__), key=lambda module: module.name)
        if module.name not in NO_COMMANDS
    }


def summary(path: Path) -> str:
    """The first line of a file's docstring, without running the file."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].removesuffix(".")


JOURNEY = {
    "everlong demo": "all of it in minutes, on Python's own source",
    "everlong prepare python-stdlib --out data/mine": "a tokenizer and packed tokens",
    "everlong train --data data/mine --mixer gated_deltanet --minutes 10 --out runs/mine": "",
    "everlong eval runs/mine --data data/mine": "how well it predicts",
    'everlong generate runs/mine --prompt "import "': "what it writes",
    "everlong mixers": "the kinds of models to choose from",
    "everlong doctor": "what this machine will do, and what it lacks",
}


def _journey(as_json: bool) -> int:
    """What somebody sees who types nothing but the name: from a text of their own to a model, in ten lines."""
    if as_json:
        return _overview(as_json)
    print("everlong: efficient sequence models, from raw data to a served model.")
    print("From text to a model (in place of python-stdlib name a text file or a folder of your own):")
    for command, line in JOURNEY.items():
        print(f"  {command:<48}  {line}".rstrip())
    print("`everlong --help` lists all commands; `everlong COMMAND --help` shows a command's options and an example.")
    return 0


def _overview(as_json: bool) -> int:
    told = {name: summary(path) for name, path in commands().items()}
    if as_json:
        console.emit_json({"version": __version__, "commands": told})
        return 0
    print("everlong: efficient sequence models, from raw data to a served model")
    for name, line in told.items():
        print(f"  everlong {name:<10} {line}")
    print("`everlong COMMAND --help` shows options and an example; `--json` gives any result to a program.")
    return 0


def _version(as_json: bool) -> int:
    versions = {
        "everlong": __version__,
        "torch": importlib.metadata.version("torch"),
        "python": sys.version.split()[0],
    }
    if as_json:
        console.emit_json(versions)
    else:
        print(f"everlong {versions['everlong']} (torch {versions['torch']}, Python {versions['python']})")
    return 0
