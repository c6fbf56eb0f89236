"""Generation: the prompt in chunks, then one token after another, carrying the state.

What a call holds in memory is the state, one chunk's activations and one row of logits for each sequence. With mixers
whose state has a constant size, neither memory nor the time of a token depends on how much came before.
"""

from collections.abc import Iterator, Sequence
from typing import overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from everlong.generate.sampling import Sampling, generators, sample
from everlong.mixers.base import Context, sees_ahead
from everlong.models.lm import LanguageModel, State

CHUNK = 2048


@overload
def generate(
    model: LanguageModel,
    prompt_tokens: Int[Tensor, "B T"],
    *,
    max_new_tokens: int,
    sampling: Sampling = ...,
    stop_tokens: Sequence[int] = ...,
    seed: int | Sequence[int] = ...,
    chunk: int = ...,
) -> Int[Tensor, "B N"]: ...


@overload
def generate(
    model: LanguageModel,
    prompt_tokens: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = ...,
    stop_tokens: Sequence[int] = ...,
    seed: int | Sequence[int] = ...,
    chunk: int = ...,
) -> list[list[int]]: ...


def generate(
    model: LanguageModel,
    prompt_tokens: Int[Tensor, "B T"] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_tokens: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    chunk: int = CHUNK,
) -> Int[Tensor, "B N"] | list[list[int]]:
    """Continues prompts; the new tokens, in the form in which the prompts came.

    Args:
        prompt_tokens: a tensor, or lists, which may differ in length.
        max_new_tokens: how many tokens a sequence gets at most.
        stop_tokens: a sequence ends with the first of these, which belongs to the result. In a tensor it is repeated
            up to the end of the longest row.
        seed: row i draws from the stream of seed + i, or of its own seed where there is one for each. Its random
            numbers do not depend on the other rows (its logits may, in their last bits, through torch's products).
        chunk: tokens of the prompt that are read at once.

    Raises:
        ValueError: an empty prompt, a token that the model does not know, or a bad number.
    """
    prompts = prompt_tokens.tolist() if isinstance(prompt_tokens, Tensor) else prompt_tokens
    stops = frozenset(stop_tokens)
    made: list[list[int]] = [[] for _ in prompts]
    steps = _steps(model, prompts, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, chunk=chunk)
    for tokens in steps:
        for row, token in zip(made, tokens, strict=True):
            if not row or row[-1] not in stops:
                row.append(token)
        if all(row[-1] in stops for row in made):
            break
    if not isinstance(prompt_tokens, Tensor):
        return made
    longest = max(map(len, made), default=0)
    rows = [row + row[-1:] * (longest - len(row)) for row in made]
    return torch.tensor(rows, dtype=torch.long, device=prompt_tokens.device).view(len(rows), longest)


def stream(
    model: LanguageModel,
    prompt_tokens: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
    chunk: int = CHUNK,
) -> Iterator[int]:
    """Continues one prompt, token by token; the same tokens as `generate`, each as soon as it is known."""
    stops = frozenset(stop_tokens)
    steps = _steps(model, [prompt_tokens], max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, chunk=chunk)
    for (token,) in steps:
        yield token
        if token in stops:
            return


def _steps(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int | Sequence[int],
    chunk: int,
) -> Iterator[list[int]]:
    """The next token of every sequence, step after step."""
    tokens, padding = left_padded(prompts, model.config.vocab_size)
    for name, number in (("max_new_tokens", max_new_tokens), ("chunk", chunk)):
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1: got {number}")
    for mixer, options in model.config.pattern():
        if (found := sees_ahead(mixer, options)) is not None:
            layer, way = found
            raise ValueError(f"a model with {layer} sees the tokens to come, and generates none: {way}")
    if model.config.embedding_looks_ahead:
        raise ValueError(f"a model with positions={model.config.positions} sees the tokens to come: it generates none")
    known, longest = model.config.position_limit, max(map(len, prompts))
    if known is not None and longest + max_new_tokens - 1 > known:
        raise ValueError(
            f"the model has learned {known:,} positions: got a prompt of {longest:,} tokens, and {max_new_tokens:,} "
            "to follow. Give a shorter prompt, or fewer new tokens"
        )
    streams = generators(seed, len(prompts))
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    padding = None if padding is None else padding.to(device)
    seen = None
    if sampling.repetition_penalty != 1:
        seen = _seen(tokens, padding, model.config.vocab_size)
    logits, state = prefill(model, tokens, padding=padding, chunk=chunk)
    for remaining in reversed(range(max_new_tokens)):
        chosen = sample(logits, sampling, seen, streams)
        yield chosen.tolist()
        if remaining:
            if seen is not None:
                seen.scatter_(1, chosen[:, None], True)
            logits, state = step(model, chosen, state)


# The mode is entered and left within each of these two: around a `yield` it would hold for the caller as well.
@torch.inference_mode()
def prefill(
    model: LanguageModel,
    tokens: Int[Tensor, "B T"],
    state: State | None = None,
    *,
    padding: Bool[Tensor, "B T"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "B C"], State]:
    """Reads prompts in chunks: the logits of the token after the last, and the state there.

    Padding stands on the left, so that every row's last token is real.
    """
    state = model.init_state(len(tokens)) if state is None else state
    for start in range(0, tokens.shape[1], chunk):
        part = slice(start, start + chunk)
        real = None if padding is None or padding[:, part].all() else padding[:, part]
        x, state = model.hidden(tokens[:, part], state, Context(padding=real))
    return model.logits(x[:, -1]), state


@torch.inference_mode()
def step(model: LanguageModel, tokens: Int[Tensor, " B"], state: State) -> tuple[Float[Tensor, "B C"], State]:
    """Reads one token of every sequence: the logits of the next, and the state after it."""
    x, state = model.hidden(tokens[:, None], state, Context())
    return model.logits(x[:, -1]), state


def left_padded(
    prompts: Sequence[Sequence[int]], vocab_size: int
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"] | None]:
    """Prompts as rows that end together, and where the real tokens are (None: everywhere).

    Raises:
        ValueError: a prompt is empty, or holds what is no token of the model.
    """
    if not prompts or not all(isinstance(prompt, Sequence) for prompt in prompts):
        raise ValueError("`prompt_tokens` must be [B, T], or a list with a list of tokens for each of B >= 1 prompts")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty: it needs at least one token, such as the end of a document")
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise ValueError(f"prompt {row} holds token {token}; the model knows 0 to {vocab_size - 1}")
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    if all(len(prompt) == longest for prompt in prompts):
        return tokens, None
    missing = torch.tensor([longest - len(prompt) for prompt in prompts])
    return tokens, torch.arange(longest) >= missing[:, None]


def _seen(tokens: Int[Tensor, "B T"], padding: Bool[Tensor, "B T"] | None, vocab_size: int) -> Bool[Tensor, "B C"]:
    """Which tokens of the vocabulary each prompt holds."""
    # Padding takes the row's last token, which is real, in place of its zeros.
    held = tokens if padding is None else torch.where(padding, tokens, tokens[:, -1:])
    seen = torch.zeros(len(tokens), vocab_size, dtype=torch.bool, device=tokens.device)
    return seen.scatter_(1, held, True)


class StopStrings:
    """Ends a text before the first of some strings, which may begin in one piece of the text and end in another.

    What could still become a stop string is held back until it is decided.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if "" in strings:
            raise ValueError("a stop string must hold at least one character: got an empty one")
        self.strings, self.stopped = tuple(strings), False
        self._held = ""

    def push(self, text: str) -> str:
        """Takes the next piece; what of the text is now certain to come before any stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        places = [(text.find(stop), stop) for stop in self.strings]
        found = [(place + len(stop), place) for place, stop in places if place >= 0]
        if found:  # the first to be complete counts, so that it does not matter how the text is cut into pieces
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        open_at = min((_begun(text, stop) for stop in self.strings), default=len(text))
        self._held = text[open_at:]
        return text[:open_at]

    def finish(self) -> str:
        """The end of the text: what was held back turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """Where the longest end of `text` starts that is a beginning of `stop`; the text's length where there is none."""
    for start in range(max(0, len(text) - len(stop) + 1), len(text)):
        if stop.startswith(text[start:]):
            return start
    return len(text)
