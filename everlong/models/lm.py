"""The language model: embedding, blocks of a mixer and a feed-forward, a head. One model serves every mixer and hybrid.

    pre         x + mixer(norm(x)),  then x + feed_forward(norm(x))          (Xiong et al. 2020, arXiv 2002.04745)
    post        norm(x + mixer(x)),  then norm(x + feed_forward(x))          (Vaswani et al. 2017, arXiv 1706.03762)
    parallel    x + mixer(norm(x)) + feed_forward(norm(x))                   (Wang and Komatsuzaki 2021, GPT-J)

A mixer that owns its feed-forward is the whole branch: it reads the stream and norms it itself, x + mixer(x).
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from everlong import mixers
from everlong.config import config, from_dict
from everlong.mixers.base import Context, Cost, Mixer, unpadded
from everlong.nn.layers import InputNorm, SwiGLU, exact, linear_cross_entropy
from everlong.nn.positions import Kept, Position, PositionEncoding, attach, parse

LARGEST = {"vocab_size": 1 << 24, "width": 1 << 20, "num_layers": 1 << 12}  # beyond these a number is a slip

Layer = str | dict[str, Any]  # a mixer's name, or {"mixer": name, option: value, ...}
State = tuple[Any, ...]


@config
class ModelConfig:
    """The shape of a language model."""

    vocab_size: int
    width: int = 256
    num_layers: int = 4
    layers: tuple[Layer, ...] = ("attention",)
    """The mixers, repeated over the depth."""
    feed_forward: int | None = None
    """Hidden channels of the feed-forward; None: 8/3 of the width, rounded up to a multiple of 32."""
    block: Literal["pre", "post", "parallel"] = "pre"
    tie_embeddings: bool = True
    """The head shares the embedding's weights."""
    bias: bool = False
    """Biases in the feed-forward, and in each mixer that has them as an option."""
    norm: Literal["rms", "layer"] = "rms"
    """The norms outside of the mixers; "layer" subtracts the mean as well, and has a bias (Ba et al. 2016)."""
    norm_eps: float = 1e-5
    learned_positions: int | None = None
    """A learned vector for each of so many positions, added to the embedding; no longer text can then be read, as in
    GPT-2 and BERT. None: there are none, and no limit. The same as `positions` "learned" of that `length`."""
    positions: Position | None = None
    """Encoding of positions that meets the embedding: a name, or a mapping with its options."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1: got {getattr(self, name)}")
            if getattr(self, name) > LARGEST[name]:
                raise ValueError(f"`{name}` must be at most {LARGEST[name]:,}: got {getattr(self, name):,}")
        if self.learned_positions is not None and not 1 <= self.learned_positions <= LARGEST["vocab_size"]:
            raise ValueError(f"`learned_positions` must be at least 1 and no slip: got {self.learned_positions}")
        if self.learned_positions is not None and self.positions is not None:
            raise ValueError(
                f"positions of the embedding are given once: got learned_positions={self.learned_positions} and "
                f"positions={self.positions}"
            )
        if (asked := self.embedding_positions) is not None:
            with torch.device("meta"):
                self.encoding(asked)
        if not self.layers:
            raise ValueError(f"`layers` must name at least one mixer. There is: {', '.join(mixers.names())}")
        for layer in self.layers:
            self.mixer(layer)

    @property
    def hidden(self) -> int:
        """Channels inside the feed-forward."""
        return -(-self.width * 8 // 3 // 32) * 32 if self.feed_forward is None else self.feed_forward

    @property
    def embedding_positions(self) -> Position | None:
        """The encoding that meets the embedding, whichever option it was asked for by."""
        if self.learned_positions is not None:
            return {"position": "learned", "length": self.learned_positions}
        return self.positions

    @property
    def position_limit(self) -> int | None:
        """How many positions the model knows; None: there is no last one."""
        if (asked := self.embedding_positions) is None:
            return None
        with torch.device("meta"):
            return self.encoding(asked).limit

    @property
    def embedding_looks_ahead(self) -> bool:
        """Whether the encoding that meets the embedding shows a token those that follow it."""
        asked = self.embedding_positions
        return asked is not None and not getattr(parse(asked)[1], "causal", True)

    def encoding(self, asked: Position) -> PositionEncoding:
        """An encoding for the embedding, with first weights.

        Raises:
            ValueError: no such encoding or option, or it is one of a mixer.
        """
        return attach(
            asked,
            num_heads=1,
            size=self.width,
            offered=frozenset({"embedding"}),
            mixer="embedding",
            vocab_size=self.vocab_size,
        )

    def mixer(self, layer: Layer) -> tuple[type[Mixer], Any]:
        """The class and the options of one entry of `layers`.

        Raises:
            ValueError: no such mixer, or no such option.
        """
        options = {"mixer": layer} if isinstance(layer, str) else dict(layer)
        if not isinstance(options.get("mixer"), str):
            raise ValueError(f"a layer is a mixer's name or has one under the key `mixer`: got {layer!r}")
        if options.get("width", self.width) != self.width:
            raise ValueError(
                f"`width` is the model's, one for all layers: got {self.width}, and {layer!r}. Leave that out"
            )
        found = mixers.load(options.pop("mixer"))
        fields = {field.name for field in dataclasses.fields(found.Config)}
        shared = {"bias": self.bias} if "bias" in fields else {}
        return found, from_dict(found.Config, {"width": self.width, **shared, **options})

    def pattern(self) -> list[tuple[type[Mixer], Any]]:
        """The mixer of every layer."""
        return [self.mixer(self.layers[i % len(self.layers)]) for i in range(self.num_layers)]


class Seen(NamedTuple):
    """What a model whose embedding knows positions keeps beside its layers' states."""

    length: Int[Tensor, " N"]
    kept: Kept = ()  # what the encoding needs of the past


class Output(NamedTuple):
    """What the model returns."""

    logits: Float[Tensor, "B T C"]
    state: State


class Block(nn.Module):
    """A mixer and a feed-forward around the residual stream."""

    def __init__(self, config: ModelConfig, mixer: Mixer) -> None:
        super().__init__()
        self.kind, self.mixer = config.block, mixer
        self.feed_forward: SwiGLU | None = None
        if has_mixer_norm(config, mixer):
            self.mixer_norm = norm(config, makes_stream=config.block == "post")
        if not mixer.traits.owns_feed_forward:
            self.feed_forward = SwiGLU(config.width, config.hidden, bias=config.bias)
            if config.block != "parallel":
                self.feed_forward_norm = norm(config, makes_stream=config.block == "post")
        # What writes to the residual stream starts smaller, the more layers write to it.
        for writer in (getattr(mixer, "o", None), getattr(self.feed_forward, "down", None)):
            if isinstance(writer, nn.Linear):
                nn.init.normal_(writer.weight, std=(2 * config.num_layers * writer.in_features) ** -0.5)

    def forward(self, x: Float[Tensor, "B T D"], state: Any, context: Context) -> tuple[Float[Tensor, "B T D"], Any]:
        if self.feed_forward is None:
            mixed, state = self.mixer(x, state, context)
            return (self.mixer_norm(x + mixed) if self.kind == "post" else x + mixed), state
        y = x if self.kind == "post" else self.mixer_norm(x)
        mixed, state = self.mixer(y, state, context)
        if self.kind == "parallel":
            return x + mixed + self.feed_forward(y), state
        if self.kind == "post":
            x = self.mixer_norm(x + mixed)
            return self.feed_forward_norm(x + self.feed_forward(x)), state
        x = x + mixed
        return x + self.feed_forward(self.feed_forward_norm(x)), state


def has_mixer_norm(config: ModelConfig, mixer: Mixer | type[Mixer]) -> bool:
    """Whether a block has a norm of its own beside this mixer: after the sum, or before a mixer that has none."""
    return config.block == "post" or not mixer.traits.owns_feed_forward


def norm(config: ModelConfig, *, makes_stream: bool) -> nn.Module:
    """A norm of the model's kind. One after a residual sum makes the stream itself, which stays in float32."""
    if config.norm == "layer":
        return nn.LayerNorm(config.width, eps=config.norm_eps)
    return (nn.RMSNorm if makes_stream else InputNorm)(config.width, eps=config.norm_eps)


class LanguageModel(nn.Module):
    """Tokens in, a distribution over the next token out, and a state that continues the sequence."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        asked = config.embedding_positions
        self.positions = None if asked is None else config.encoding(asked)
        self.blocks = nn.ModuleList(
            Block(config, mixer(options, layer=i, depth=config.num_layers))
            for i, (mixer, options) in enumerate(config.pattern())
        )
        self.norm = norm(config, makes_stream=False)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)
        if not config.tie_embeddings:
            nn.init.normal_(self.head.weight, std=0.02)

    def init_state(self, batch: int) -> State:
        """The state of `batch` sequences before their first token."""
        states = tuple(block.mixer.init_state(batch) for block in cast(Iterable[Block], self.blocks))
        if self.positions is None:
            return states
        length = torch.zeros(batch, dtype=torch.long, device=self.embedding.weight.device)
        return *states, Seen(length, self.positions.init_kept(batch))

    @unpadded
    def hidden(
        self, tokens: Int[Tensor, "B T"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """What the head reads, after the last norm; and the state after the last token."""
        return self._through(self.embedding(tokens), tokens, state, context)

    @unpadded
    def mix(
        self, x: Float[Tensor, "B T D"], state: State | None = None, context: Context = Context()
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """`hidden`, of vectors in the place of embedded tokens."""
        return self._through(x, None, state, context)

    def _through(
        self, x: Float[Tensor, "B T D"], tokens: Int[Tensor, "B T"] | None, state: State | None, context: Context
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """All blocks and the last norm; there is no padding any more."""
        context = dataclasses.replace(context, first={})
        past: State = (None,) * len(self.blocks) if state is None else state[: len(self.blocks)]
        after: list[Any] = []
        count = None
        if self.positions is not None:
            seen: Seen | None = None if state is None else state[-1]
            where, lengths = context.count_from(None if seen is None else seen.length, x), context.lengths(x)
            kept = () if seen is None else seen.kept
            x, kept = self.positions.embed(x, where, tokens=tokens, kept=kept, cu_seqlens=context.cu_seqlens)
            count = Seen(lengths if seen is None else seen.length + lengths, kept)
        for block, before in zip(self.blocks, past, strict=True):
            x, now = block(x, before, context)
            after.append(now)
        return self.norm(x), tuple(after) if count is None else (*after, count)

    def logits(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B C"]:
        """Unnormalised log probabilities, in float32 at least."""
        return exact(self.head(x))

    def forward(self, tokens: Int[Tensor, "B T"], state: State | None = None, context: Context = Context()) -> Output:
        """Logits of the token after each, and the state that continues the sequences."""
        x, state = self.hidden(tokens, state, context)
        return Output(self.logits(x), state)

    def loss(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        context: Context = Context(),
        *,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Float[Tensor, "..."]:
        """Cross entropy in nats over targets of at least 0; "none" gives `[B, T]`, zeros where ignored."""
        x, _ = self.hidden(tokens, None, context)
        value = linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten(), reduction=reduction)
        return value if reduction == "mean" else value.view(targets.shape)

    def cost(self, length: int) -> Cost:
        """Of one token in the recurrent form, `length` tokens into a sequence."""
        c = self.config
        of_norm = 2 * c.width if c.norm == "layer" else c.width
        flops, state, parameters = 2 * c.width * c.vocab_size, 0, of_norm + c.vocab_size * c.width
        parameters += 0 if c.tie_embeddings else c.vocab_size * c.width
        if (asked := c.embedding_positions) is not None:
            with torch.device("meta"):
                encoding = c.encoding(asked)
                kept = sum(4 * leaf.numel() for leaf in encoding.init_kept(1))
            flops, state = flops + encoding.flops(1, length + 1, 1), state + 8 + kept
            parameters += sum(parameter.numel() for parameter in encoding.parameters())
        for mixer in (block.mixer for block in cast(Iterable[Block], self.blocks)):
            cost = mixer.cost(mixer.config, length)  # its own options: they may depend on the layer's place
            flops, state = flops + cost.flops_per_token, state + cost.state_bytes
            parameters += cost.parameters + (of_norm if has_mixer_norm(c, mixer) else 0)
            if not mixer.traits.owns_feed_forward:
                weights = 3 * c.width * c.hidden
                flops += 2 * weights
                parameters += weights + (2 * c.hidden + c.width if c.bias else 0)
                parameters += of_norm if c.block != "parallel" else 0
        return Cost(flops_per_token=flops, state_bytes=state, parameters=parameters)

    def save(self, run: str | Path) -> None:
        """Writes the model to a run folder, in the style of Hugging Face."""
        from everlong.models.run import save  # the reader there needs this class

        save(self, run)
