"""From words on the command line to a command's `Arguments`, and from everything wrong with them to one line.

tyro reads the words. It tells its errors in a box on standard error and exits; the box is read here, and told in the
house's one line: the rule, what arrived, the way out.
"""

import contextlib
import inspect
import io
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_type_hints

import pydantic
import tyro
from tyro.constructors import PrimitiveConstructorSpec

from everlong.config import nearest

T = TypeVar("T")

_JSON_HELP = (
    "With --json the last line of standard output is the result as one JSON object; the rest goes to standard error."
)
_CORNERS = ("╭", "╰")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# What tyro calls a value's kind in its help, in words.
_KINDS = {"INT": "a whole number", "FLOAT": "a number", "PATH": "a path", "STR": "a text"}


def _split(words: list[str]) -> tuple[str, ...]:
    return tuple(part.strip() for part in words[0].split(",") if part.strip())


Names = Annotated[
    tuple[str, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="A,B,...",
        instance_from_str=_split,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(value)],
    ),
]
"""A field that is given as a list with commas: `--layers mamba2,attention`."""

MAY_BE_EMPTY = "may be empty"
"""Annotates a field for which an empty text means something: `prompt: Annotated[str, MAY_BE_EMPTY]`."""


def parse(cls: type[T], words: Sequence[str], *, program: str) -> T:
    """The arguments that `words` give; prints the help and raises SystemExit(0) where they ask for it.

    Raises:
        ValueError: they give none; in one line.
    """
    if told := explain_words(words, get_type_hints(cls, include_extras=True)):
        raise ValueError(f"{told}. See `{program} --help`")
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            arguments, strangers = tyro.cli(
                cls,
                prog=program,
                args=list(words),
                description=f"{inspect.cleandoc(cls.__doc__ or '')}\n\n{_JSON_HELP}",
                return_unknown_args=True,
                config=(tyro.conf.PositionalMetavarFromFieldName, tyro.conf.DisallowNone),
            )
    except SystemExit as end:
        if not end.code:
            raise
        if isinstance(end.__context__, pydantic.ValidationError):
            message = explain_fields(end.__context__)
        else:
            message = explain_box(box.getvalue(), words, options(cls))
        raise ValueError(f"{message}. See `{program} --help`") from None
    if strangers:
        raise ValueError(f"{explain_stranger(strangers, options(cls))}. See `{program} --help`")
    return arguments


def options(cls: type) -> list[str]:
    """The options that a command takes, as they are typed."""
    names = []
    for name, annotation in get_type_hints(cls, include_extras=True).items():
        if tyro.conf.Positional not in getattr(annotation, "__metadata__", ()):
            names.append(f"--{name.replace('_', '-')}")
            if annotation is bool:
                names.append(f"--no-{name.replace('_', '-')}")
    return [*names, "--help", "--json"]


def explain_words(words: Sequence[str], fields: Mapping[str, Any]) -> str:
    """What is wrong with words that tyro would take in silence; nothing where all is well.

    Of an option that is given twice the last would count, and an empty path would be the current folder.
    """
    marks = {name: getattr(annotation, "__metadata__", ()) for name, annotation in fields.items()}
    places = [name for name in fields if tyro.conf.Positional in marks[name]]
    given: set[str] = set()
    before = ""
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        name = option.removeprefix("--").replace("-", "_")
        name = name if name in fields else name.removeprefix("no_")
        if option and name in fields:
            if equals and fields[name] is bool:
                return f"`{option}` takes no value: got `{value}`"
            if name in given and tyro.conf.UseAppendAction not in marks[name]:
                return f"`{option}` must be given once: it is given twice"
            given.add(name)
        owner = name if option else before
        if not value and (equals or not option) and owner in fields and MAY_BE_EMPTY not in marks[owner]:
            return f"`--{owner.replace('_', '-')}` must not be empty"
        if not value and not option and not owner and places:
            return f"`{places[0].upper()}` must not be empty"
        before = name if option and not equals and fields.get(name) is not bool else ""
    return ""


def explain_fields(error: pydantic.ValidationError) -> str:
    """What is wrong with values that were read: the option, the rule, what arrived."""
    parts = []
    for item in error.errors():
        message = item["msg"].removeprefix("Value error, ")
        place = "-".join(str(part) for part in item["loc"][:1]).replace("_", "-")
        parts.append(f"`--{place}`: {message[:1].lower()}{message[1:]}, got {item['input']!r}" if place else message)
    return "; ".join(parts).rstrip(".")


def explain_stranger(strangers: Sequence[str], known: Sequence[str]) -> str:
    """What is wrong with words that no option takes."""
    named = [word.partition("=")[0] for word in strangers if word.startswith("-")]
    if not named:
        return f"nothing takes the word `{strangers[0]}`"
    option = named[0].replace("_", "-")
    if option in known and "=" in strangers[0]:
        return f"`{option}` takes no value: got `{strangers[0].partition('=')[2]}`"
    longer = [name for name in known if name.startswith(option)] if len(option) > 3 else []
    by_word = {name.lstrip("-"): name for name in known}  # the hyphens, which all share, would make all look alike
    close = longer[0] if longer else by_word.get(nearest(option.lstrip("-"), by_word) or "")
    return f"unknown option `{named[0]}`" + (f". Nearest: `{close}`" if close else "")


def explain_box(box: str, words: Sequence[str], known: Sequence[str]) -> str:
    """The one line for what tyro's error box says; the box's own words, joined, where it is of an unknown kind."""
    sections = _sections(box)
    text = " ".join(row.strip() for row in sections[0])
    if text.startswith("Missing from"):
        strangers = [row.strip() for section in sections for row in _after(section, "Unrecognized options:")]
        if any(word.startswith("-") for word in strangers):
            return explain_stranger(strangers, known)
        missing = [row.strip() for row in sections[0] if re.match(r" {4}\S", row)]
        return f"needs {' and '.join(f'`{name}`' for name in missing)}"
    if found := re.match(r"Missing value for argument '(\S+)'", text):
        return _explain_absent(found[1], words, known)
    if found := re.match(r"invalid choice '(.*)' for argument '(\S+)'. Expected one of (.*)\.$", text):
        choices = re.findall(r"'([^']*)'", found[3])
        value = _given(found[2], words, found[1])
        close = nearest(value, choices)
        hint = f". Nearest: `{close}`" if close else ""
        return f"`{_shown(found[2])}` must be one of {', '.join(choices)}: got `{value}`{hint}"
    if found := re.match(r"Error parsing (\S+?): (?:.*?'(.*?)')?", text):
        option = found[1].rpartition("/")[2]
        kinds = [row.split()[-1] for section in sections for row in _after(section, "Argument helptext:")[:1]]
        kind = _KINDS.get(kinds[0], kinds[0]) if kinds else "another value"
        return f"`{_shown(option)}` takes {kind}: got `{_given(option, words, found[2])}`"
    return text.rstrip(".") or "these arguments cannot be read"


def _explain_absent(option: str, words: Sequence[str], known: Sequence[str]) -> str:
    spelled = {word: word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    strangers = [word for word, name in spelled.items() if name not in known]
    if strangers and not option.startswith("-"):  # what stands where a positional argument should be
        return explain_stranger(strangers, known)
    place = words.index(option) if option in words else len(words)
    following = words[place + 1] if place + 1 < len(words) else ""
    if following.startswith("-"):
        return f"`{option}` needs a value; one that begins with a hyphen is given as `{option}={following}`"
    return f"`{_shown(option)}` needs a value"


def _shown(option: str) -> str:
    """An option as it is typed, a positional argument as the help calls it."""
    return option if option.startswith("-") else option.upper()


def _given(option: str, words: Sequence[str], quoted: str | None) -> str:
    """The value that the words give to an option; what the box quotes where it stands alone, as a positional argument.

    The words come first because the box cuts a long one in two.
    """
    spelled = [word.replace("_", "-") if word.startswith("--") and "=" not in word else word for word in words]
    for place in reversed(range(len(spelled))):
        if spelled[place] == option and place + 1 < len(words):
            return words[place + 1]
        if spelled[place].partition("=")[0].replace("_", "-") == option:
            return words[place].partition("=")[2]
    return quoted or " ".join(words)


def _sections(box: str) -> list[list[str]]:
    """The rows inside a box, cut where it has a rule; a row keeps its indentation.

    A row stands between bars, or two columns in where standard output takes no such characters.
    """
    sections: list[list[str]] = [[]]
    for line in _COLOURS.sub("", box).splitlines():
        if line[:1] in _CORNERS or line[1:2].strip():  # the frame, or the title above a box without one
            continue
        row = line[2:].rstrip().removesuffix("│").rstrip()
        if row and set(row) <= {"─", "-"}:
            sections.append([])
        elif row:
            sections[-1].append(row)
    return sections


def _after(section: Sequence[str], title: str) -> list[str]:
    return list(section[1:]) if section and section[0].strip() == title else []


def one_line(error: Any) -> str:
    """An error's message without its line breaks; the path and the reason for errors of the file system."""
    if isinstance(error, pydantic.ValidationError):
        return explain_fields(error)
    if isinstance(error, OSError) and error.strerror:
        reason = f"{error.strerror[:1].lower()}{error.strerror[1:]}"
        return f"{error.filename}: {reason}" if error.filename is not None else reason
    return " ".join(str(error).split()) or type(error).__name__
