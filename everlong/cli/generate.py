"""Continues a text with a trained model.

The text appears as it is made, character by whole character; a stop string never shows, not even its beginning.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated

import tyro

from everlong.cli import console
from everlong.cli.parsing import MAY_BE_EMPTY
from everlong.config import config
from everlong.data.tokenizer import StreamDecoder, Tokenizer
from everlong.generate.decode import CHUNK, StopStrings, stream
from everlong.generate.sampling import Sampling
from everlong.models.lm import LanguageModel
from everlong.models.run import load, load_tokenizer


@config
class Arguments:
    """Continues a text with a trained model; the new text goes to standard output as it is made.

    Examples:
        everlong generate runs/demo --prompt "def main(" --max-new-tokens 100
        everlong generate runs/demo --prompt-file story.txt --temperature 0.8 --top-p 0.95 --seed 1
        echo "import os" | everlong generate runs/demo --prompt - --temperature 0
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    prompt: Annotated[str | None, MAY_BE_EMPTY] = None
    """The text to continue; - reads it from standard input; an empty one begins a new document."""
    prompt_file: Path | None = None
    """File with the text to continue, as it is, its last line break included."""
    max_new_tokens: int = 256
    """Tokens at most."""
    temperature: float = 1.0
    """Below 1 more likely text, above 1 more varied; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Choose from this many of the likeliest tokens."""
    top_p: float | None = None
    """Choose from the fewest tokens that together have this probability."""
    min_p: float | None = None
    """Choose from tokens at least this many times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1, what was in the text becomes less likely."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End before this text; may be given several times."""
    seed: int = 0
    """The same seed gives the same text."""


@dataclass
class Told:
    """What was generated, filled while the pieces of its text are taken."""

    tokens: list[int] = field(default_factory=list)
    stopped_by: str = "length"
    began: float = 0.0
    first: float = 0.0
    ended: float = 0.0


def run(arguments: Arguments) -> dict[str, object]:
    """Generates, printing each piece of text when it is certain."""
    prompt = read_prompt(arguments.prompt, arguments.prompt_file)
    model, tokenizer = load(arguments.run), load_tokenizer(arguments.run)
    prompt_tokens = tokenizer.encode(prompt) or [tokenizer.end]
    told, text = Told(), ""
    made = pieces(model, tokenizer, prompt_tokens, arguments, told)
    if len(prompt_tokens) > CHUNK:  # a shorter prompt is read at once
        with console.progress(f"reading a prompt of {len(prompt_tokens):,} tokens"):
            made = chain([next(made)], made)
    for piece in made:
        text += piece
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    speed = (len(told.tokens) - 1) / (told.ended - told.first) if len(told.tokens) > 1 else None
    if speed is not None:
        print(f"{len(told.tokens)} tokens, {speed:,.1f} tokens/s", file=sys.stderr)
    return {
        "text": text,
        "tokens": len(told.tokens),
        "token_ids": told.tokens,
        "prompt_tokens": len(prompt_tokens),
        "stopped_by": told.stopped_by,
        "seconds": told.ended - told.began,
        "prompt_seconds": told.first - told.began,
        "tokens_per_second": speed,
    }


def pieces(
    model: LanguageModel, tokenizer: Tokenizer, prompt_tokens: list[int], arguments: Arguments, told: Told
) -> Iterator[str]:
    """The text as it becomes certain: whole characters, and nothing that may still become a stop string."""
    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
    )
    decoder, stop = StreamDecoder(tokenizer), StopStrings(arguments.stop)
    tokens = stream(
        model,
        prompt_tokens,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        stop_tokens=(tokenizer.end,),
        seed=arguments.seed,
    )
    told.began = told.first = told.ended = time.perf_counter()
    for token in tokens:
        told.ended = time.perf_counter()
        told.first = told.ended if not told.tokens else told.first
        told.tokens.append(token)
        if token == tokenizer.end:
            told.stopped_by = "end of document"
            break
        yield stop.push(decoder.push(token))
        if stop.stopped:
            told.stopped_by = "stop string"
            return
    yield stop.push(decoder.finish()) + stop.finish()


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The text to continue, from the one place that was named.

    Raises:
        ValueError: none or both were named, or the text is no UTF-8.
    """
    if (prompt is None) == (file is None):
        raise ValueError("give the text to continue by one of `--prompt TEXT`, `--prompt -` and `--prompt-file FILE`")
    if file is None and prompt != "-":
        assert prompt is not None
        return prompt
    source = str(file) if file else "standard input"
    data = file.read_bytes() if file else sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise ValueError(f"{source} is no UTF-8 text: {where}. `iconv -t UTF-8` converts a text") from None
