"""What the operators make of a training: updates of whole language models beside transformers', and beside our own."""

from collections.abc import Callable

from everlong.lab.bench import updates
from everlong.lab.bench.result import Row
from everlong.lab.bench.updates import Size, beside

TRANSFORMER = Size(width=320, num_layers=6)
# transformers' Mamba models have no feed-forward; ours has one that is all but nothing.
STATE_SPACE = Size(width=256, num_layers=4, feed_forward=32)
STATES = 64
TOKENS = 4096  # of an update, or one row where the row is longer


def measures() -> dict[str, Callable[[str], Row]]:
    """All rows by name, without apostrophes: torch.compile writes what follows `--only` into its code as it is."""
    made: dict[str, Callable[[str], Row]] = {
        "tokens/s of training over Mamba of transformers, 4 layers, width 256, float32, T = 512": _mamba,
        "tokens/s of training over Mamba-2 of transformers, 4 layers, width 256, float32, T = 512": _mamba2,
    }
    for compiled, target in ((False, ">= 2.2"), (True, ">= 1.2")):
        for length in (512, 4096):
            how = "compiled" if compiled else "eager"
            made[
                f"tokens/s of training over Llama of transformers, 6 layers, width 320, bf16, {how}, T = {length:,}"
            ] = lambda measure, length=length, compiled=compiled, target=target: _llama(
                measure, length, compiled, target
            )
    for length, target in ((512, ">= 0.9"), (4096, ">= 1.5"), (16_384, ">= 5")):
        made[f"tokens/s of training over our own attention, gated_deltanet, 6 layers, bf16, T = {length:,}"] = (
            lambda measure, length=length, target=target: _gated_deltanet(measure, length, target)
        )
    return made


def _llama(measure: str, length: int, compiled: bool, target: str) -> Row:
    heads = {"mixer": "attention", "num_heads": TRANSFORMER.heads}
    return beside(
        measure,
        {
            "ours": updates.ours(TRANSFORMER, heads, compiled=compiled),
            "theirs": updates.llama(TRANSFORMER, longest=length, compiled=compiled),
        },
        vocabulary=TRANSFORMER.vocab_size,
        batch=TOKENS // length,
        length=length,
        arithmetic="bf16",
        target=target,
        peer="transformers' LlamaForCausalLM",
        seconds=15.0,
        least=7,
    )


def _gated_deltanet(measure: str, length: int, target: str) -> Row:
    return beside(
        measure,
        {
            name: updates.ours(TRANSFORMER, {"mixer": name, "num_heads": TRANSFORMER.heads})
            for name in ("gated_deltanet", "attention")
        },
        vocabulary=TRANSFORMER.vocab_size,
        batch=max(1, TOKENS // length),
        length=length,
        arithmetic="bf16",
        target=target,
        peer="everlong, attention",
        seconds=15.0,
        least=3,
        warmup=1,
    )


def _mamba(measure: str) -> Row:
    sides = {"ours": updates.ours(STATE_SPACE, "mamba"), "theirs": updates.mamba(STATE_SPACE)}
    return _state_space(measure, sides, ">= 40", "transformers' MambaForCausalLM", least=3)


def _mamba2(measure: str) -> Row:
    sides = {
        "ours": updates.ours(STATE_SPACE, {"mixer": "mamba2", "state_size": STATES}),
        "theirs": updates.mamba2(STATE_SPACE, states=STATES),
    }
    return _state_space(measure, sides, ">= 4", "transformers' Mamba2ForCausalLM", least=7)


def _state_space(measure: str, sides: dict[str, updates.Update], target: str, peer: str, *, least: int) -> Row:
    return beside(
        measure,
        sides,
        vocabulary=STATE_SPACE.vocab_size,
        batch=1,
        length=512,
        arithmetic="float32",
        target=target,
        peer=peer,
        seconds=10.0,
        least=least,
        warmup=1,
    )
