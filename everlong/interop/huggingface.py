"""everlong's models as transformers knows models: importing this file registers them with its Auto classes.

    import everlong.interop.huggingface
    model = transformers.AutoModelForCausalLM.from_pretrained("runs/novel")

Tensors have the names that they have in a run, so that either side reads what the other has saved. What transformers
calls a cache is here everlong's state: it goes on from where it ends and cannot be cut back, so that decoding that
takes tokens back (assisted, prompt lookup) is refused by transformers itself.

The signatures below are those that transformers, its Trainer and PEFT call.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from everlong.config import from_dict, to_dict
from everlong.mixers.base import Context, expand
from everlong.models.lm import Block, LanguageModel, ModelConfig, State

OPTIONS = tuple(field.name for field in dataclasses.fields(ModelConfig))


class EverlongConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The options of a `ModelConfig` under their own names, and under those by which transformers asks for them."""

    model_type = "everlong"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "width",
        "num_hidden_layers": "num_layers",
        "tie_word_embeddings": "tie_embeddings",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(self, **options: Any) -> None:
        """Takes the options of a `ModelConfig` as keywords, and whatever else transformers keeps in a config.

        Raises:
            ValueError: an option of the model is missing or wrong.
        """
        named = {self.attribute_map.get(name, name): value for name, value in options.items()}
        shape = from_dict(ModelConfig, {name: value for name, value in named.items() if name in OPTIONS})
        super().__init__(**{**named, **to_dict(shape)})

    def model_config(self) -> ModelConfig:
        """The shape of the model as everlong's own config."""
        return from_dict(ModelConfig, {name: getattr(self, name) for name in OPTIONS})


class StateCache(Cache):
    """The state of a model where transformers expects a cache: it grows by what a call reads, and is never cut back."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: State | None = None
        self.columns = 0  # tokens read in each row, padding included

    def __len__(self) -> int:
        return len(self.state or ())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read in each row, padding included: how much of the input to leave out, as `generate` asks."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest sequence."""
        return -1

    @property
    def batch_size(self) -> int:
        """The number of sequences; -1 before the first call."""
        leaves = [leaf for leaf in pytree.tree_leaves(self.state) if isinstance(leaf, Tensor)]
        return len(leaves[0]) if leaves else -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        return False

    def reorder_cache(self, beam_idx: Int[Tensor, " N"]) -> None:
        """Lets row i go on from what row `beam_idx[i]` has read."""
        self._map(lambda leaf: leaf.index_select(0, beam_idx.to(leaf.device)))

    def batch_select_indices(self, indices: Shaped[Tensor, " N"]) -> None:
        """Keeps the rows of these numbers, or those where a mask is true."""
        self._map(lambda leaf: leaf[indices.to(leaf.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row this many times, the copies side by side."""
        self._map(lambda leaf: leaf.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Forgets everything."""
        self.state, self.columns = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: what a state has read cannot be taken out of it."""
        raise ValueError(
            f"a state cannot be cut back, here by {tokens_to_remove} tokens: "
            "keep a `copy.copy` of the cache from before them, and go on from that"
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = pytree.tree_map_only(Tensor, change, self.state)


class EverlongForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A `LanguageModel` whose parts stand under the same names in a model of transformers."""

    config_class = EverlongConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"head.weight": "embedding.weight"}
    _input_embed_layer = "embedding"
    _is_stateful = True
    accepts_loss_kwargs = True  # `num_items_in_batch`, by which Trainer keeps accumulated gradients right
    supports_gradient_checkpointing = False

    hidden = LanguageModel.hidden
    mix = LanguageModel.mix
    _through = LanguageModel._through
    logits = LanguageModel.logits
    init_state = LanguageModel.init_state

    def __init__(self, config: EverlongConfig) -> None:
        super().__init__(config)
        model = LanguageModel(config.model_config())
        self.embedding, self.blocks, self.norm = model.embedding, model.blocks, model.norm
        self.positions = model.positions
        self.head: nn.Module = model.head
        if self.embedding.weight.device.type != "meta":
            for module in self.modules():  # so that transformers does not draw other weights in the place of these
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Gives a module what a checkpoint has not: buffers that are never saved, and weights that are missing.

        transformers builds a model without memory for its tensors, reads those of the checkpoint, and then calls this
        for each module that still owns others; of the missing weights it has warned by then.
        """
        place = next((name for name, part in self.named_modules() if part is module), "")
        if not place.startswith(("blocks.", "positions")):
            super()._init_weights(module)  # type: ignore[no-untyped-call]
            return
        shape, whole = self.config.model_config(), nn.Module()
        if place.startswith("positions"):
            asked = shape.embedding_positions
            assert asked is not None
            whole.positions = shape.encoding(asked)
            inside = place
        else:
            _, layer, inside = f"{place}.".split(".", 2)
            mixer, options = shape.pattern()[int(layer)]
            whole = Block(shape, mixer(options, layer=int(layer), depth=shape.num_layers))
        own = whole.get_submodule(inside.removesuffix("."))
        for name, value in (*own.named_parameters(recurse=False), *own.named_buffers(recurse=False)):
            init.copy_(getattr(module, name), value)  # which leaves alone what was read

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = StateCache()

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Shaped[Tensor, "..."] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Int[Tensor, " K"] = 0,
        num_items_in_batch: int | Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits `[B, T, vocabulary]` of the token after each, in float32 at least.

        Args:
            attention_mask: 1 where a token is real, of these tokens or of all since the cache was empty.
            past_key_values: a `StateCache`, which then also holds what this call reads.
            labels: the tokens themselves, shifted here; -100 is left out of the loss.
            use_cache: whether a cache is returned; by default outside of training, where there are no labels.
            logits_to_keep: the last so many positions only, or those of these numbers; 0: all.
            num_items_in_batch: what the summed loss is divided by, in place of its own number of targets.

        Raises:
            ValueError: the inputs do not fit each other, or attention weights are asked for.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError(
                f"a call takes either `input_ids` or `inputs_embeds`: got {'none' if tokens is None else 'both'}"
            )
        if output_attentions:
            raise ValueError(
                "`output_attentions` must be false: mixers make no attention weights that could be returned"
            )
        if not (past_key_values is None or isinstance(past_key_values, StateCache)):
            raise ValueError(
                f"`past_key_values` must be a StateCache, or left out: got {type(past_key_values).__name__}"
            )
        wanted = not self.training and labels is None if use_cache is None else use_cache
        cache = StateCache() if past_key_values is None and wanted else past_key_values
        real = real_tokens(attention_mask, tokens, 0 if cache is None else cache.columns)
        read = self.hidden if inputs_embeds is None else self.mix
        with recorded(self.blocks if output_hidden_states else ()) as inputs:
            x, state = read(tokens, None if cache is None else cache.state, Context(padding=real))
        if cache is not None:
            cache.state, cache.columns = state, cache.columns + tokens.shape[1]
        logits = self.logits(x[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if wanted else None,
            hidden_states=(*(padded(y, real) for y in inputs), x) if output_hidden_states else None,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def real_tokens(mask: Tensor | None, tokens: Shaped[Tensor, "B T *rest"], before: int) -> Bool[Tensor, "B T"] | None:
    """Where `tokens` are real, by a mask of them or of them and the `before` columns read already; None: everywhere."""
    if mask is None:
        return None
    batch, length = tokens.shape[:2]
    if mask.shape not in {(batch, length), (batch, before + length)}:
        raise ValueError(
            f"`attention_mask` must be [batch, tokens], here {(batch, before + length)}: got {tuple(mask.shape)}"
        )
    real = mask[:, mask.shape[1] - length :].bool()
    return None if bool(real.all()) else real


@contextlib.contextmanager
def recorded(blocks: Any) -> Iterator[list[Tensor]]:
    """Collects what each block is given while the context is open."""
    inputs: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])) for block in blocks]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def padded(y: Float[Tensor, "N M D"], real: Bool[Tensor, "B T"] | None) -> Float[Tensor, "B T D"]:
    """Rows as they came, from the one row in which a model mixes real tokens only."""
    return y if real is None else y.new_zeros(*real.shape, y.shape[-1]).masked_scatter(expand(real, y), y)


AutoConfig.register(EverlongConfig.model_type, EverlongConfig, exist_ok=True)
AutoModelForCausalLM.register(EverlongConfig, EverlongForCausalLM, exist_ok=True)
