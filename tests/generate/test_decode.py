"""Generation: the state carried through chunks and steps gives what the whole text gives, for every mixer found."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everlong import LanguageModel, ModelConfig, mixers
from everlong.generate.decode import StopStrings, generate, prefill, stream
from everlong.generate.sampling import Sampling

GREEDY = Sampling(temperature=0)
VOCABULARY = 53
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [12], [50, 3, 17, 17, 9], [4, 4, 8, 1, 30, 22, 19]]
LAYERS = [(name,) for name in mixers.names() if mixers.load(name).traits.causal]
HYBRID = ("gated_deltanet", {"mixer": "attention", "window": 4}, "mamba2")

layers = pytest.mark.parametrize("layers", [*LAYERS, HYBRID], ids=str)


def build(layers):
    """A model in float64 that hangs on its whole past, with logits so far apart that rounding decides nothing."""
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=VOCABULARY, width=16, num_layers=len(layers), layers=layers, tie_embeddings=False)
    model = LanguageModel(shape).double()
    torch.nn.init.normal_(model.embedding.weight, std=0.5)
    torch.nn.init.normal_(model.head.weight)
    for block in model.blocks:
        for module in block.mixer.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=0.5)
    return model.eval()


def by_hand(model, prompt, count):
    """Greedy decoding that reads the whole text again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@layers
def test_greedy_is_the_likeliest_token_of_the_whole_text(layers):
    model, other = build(layers), [*PROMPTS[0][:-2], 40, PROMPTS[0][-1]]
    made = generate(model, [PROMPTS[0], other], max_new_tokens=6, sampling=GREEDY)
    assert made == [by_hand(model, PROMPTS[0], 6), by_hand(model, other, 6)]
    first, second = (model(torch.tensor([tokens])).logits[0, -1] for tokens in (PROMPTS[0], other))
    assert (first - second).abs().max() > 1e-6  # else the test would not see whether the past is remembered


@layers
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.2)])
def test_a_batch_of_unequal_prompts_equals_each_alone(layers, sampling):
    model, seeds = build(layers), [3, 1, 4, 1]
    together = generate(model, PROMPTS, max_new_tokens=5, sampling=sampling, seed=seeds, chunk=4)
    alone = [
        generate(model, [prompt], max_new_tokens=5, sampling=sampling, seed=seed)[0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert together == alone


@layers
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_of_the_prompt_do_not_matter(layers, chunk):
    model, tokens = build(layers), torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    logits, _ = prefill(model, tokens, chunk=chunk)
    torch.testing.assert_close(logits, model(tokens).logits[:, -1])


@layers
def test_a_stream_gives_the_tokens_of_generate(layers):
    model = build(layers)
    for sampling in (GREEDY, Sampling(), Sampling(repetition_penalty=1.5)):
        expected = generate(model, PROMPTS[2:3], max_new_tokens=5, sampling=sampling, seed=7)[0]
        assert list(stream(model, PROMPTS[2], max_new_tokens=5, sampling=sampling, seed=7)) == expected


def test_a_sequence_ends_with_its_stop_token():
    model = build(HYBRID)
    free = generate(model, PROMPTS, max_new_tokens=12)
    stops = {row[3] for row in free[:2]}
    ended = generate(model, PROMPTS, max_new_tokens=12, stop_tokens=tuple(stops))
    for row, whole in zip(ended, free, strict=True):
        end = next((place for place, token in enumerate(whole) if token in stops), len(whole) - 1)
        assert row == whole[: end + 1]
    assert list(stream(model, PROMPTS[0], max_new_tokens=12, stop_tokens=tuple(stops))) == ended[0]


def test_a_tensor_comes_back_as_a_tensor_whose_ended_rows_repeat_the_stop_token():
    model, prompts = build(HYBRID), torch.tensor([PROMPTS[0][:5], PROMPTS[2]])
    free = generate(model, prompts, max_new_tokens=8)
    assert free.shape == (2, 8)
    assert free.tolist() == generate(model, prompts.tolist(), max_new_tokens=8)
    stop = int(free[0, 2])
    ended = generate(model, prompts, max_new_tokens=8, stop_tokens=(stop,))
    place = free[0].tolist().index(stop)
    assert (ended[0, place:] == stop).all()
    assert torch.equal(ended[0, : place + 1], free[0, : place + 1])


def test_row_i_has_the_seed_plus_i():
    model = build(HYBRID)
    together = generate(model, PROMPTS, max_new_tokens=6, seed=40)
    assert together == generate(model, PROMPTS, max_new_tokens=6, seed=[40, 41, 42, 43])
    assert together != generate(model, PROMPTS, max_new_tokens=6, seed=41)


def test_only_a_chunk_is_read_at_once_and_one_row_of_logits_is_made(monkeypatch):
    model, read, made = build(HYBRID), [], []
    hidden, logits = model.hidden, model.logits
    monkeypatch.setattr(model, "hidden", lambda tokens, *rest: read.append(tokens.shape[1]) or hidden(tokens, *rest))
    monkeypatch.setattr(model, "logits", lambda x: made.append(tuple(x.shape)) or logits(x))
    generate(model, [list(range(1, 24))], max_new_tokens=3, chunk=8)
    assert read == [8, 8, 7, 1, 1]
    assert made == [(1, 16)] * 3


def test_generation_leaves_the_callers_modes_alone():
    model = build(HYBRID)
    for _ in stream(model, PROMPTS[0], max_new_tokens=3):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        model(torch.tensor([PROMPTS[0]])).logits.sum().backward()  # no state of it is an inference tensor


def test_the_penalty_knows_the_prompt_but_not_its_padding(monkeypatch):
    """Token 0, which fills short rows, is not seen; what stands in the prompt is."""
    model = build(("attention",))
    monkeypatch.setattr(model, "logits", lambda x: torch.ones(len(x), VOCABULARY))
    strong = Sampling(temperature=0, repetition_penalty=2.0)
    assert generate(model, [[5, 6, 7], [1]], max_new_tokens=3, sampling=strong) == [[0, 1, 2], [0, 2, 3]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "must be \\[B, T\\]"),
        ([[1], []], "prompt 1 is empty"),
        ([[1, VOCABULARY]], f"token {VOCABULARY}; the model knows 0 to {VOCABULARY - 1}"),
        ([[-1]], "prompt 0 holds token -1"),
    ],
)
def test_bad_prompts(prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(build(("attention",)), prompts, max_new_tokens=1)


def test_bad_numbers():
    model = build(("attention",))
    with pytest.raises(ValueError, match="`max_new_tokens` must be at least 1: got 0"):
        generate(model, [[1]], max_new_tokens=0)
    with pytest.raises(ValueError, match="`chunk` must be at least 1: got 0"):
        generate(model, [[1]], max_new_tokens=1, chunk=0)


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (
            {"mixer": "attention", "causal": False},
            "attention with causal=False sees the tokens to come.*: leave it out",
        ),
        ("linformer", "linformer, which is bidirectional only, sees the tokens to come.*: take one of attention, "),
    ],
)
def test_a_model_that_sees_the_future_does_not_generate(layer, told):
    with pytest.raises(ValueError, match=told):
        generate(build((layer,)), [[1]], max_new_tokens=1)


def cut(text, places):
    places = sorted({min(place, len(text)) for place in places})
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@given(
    st.text("ab\n", max_size=24),
    st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3),
    st.lists(st.integers(0, 24), max_size=8),
)
def test_a_stop_string_ends_the_text_wherever_it_is_cut(text, stops, places):
    stop = StopStrings(stops)
    shown = "".join([stop.push(piece) for piece in cut(text, places)]) + stop.finish()
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))] if stops else []
    if not ends:
        assert not stop.stopped
        assert shown == text
        return
    longest = max(len(one) for one in stops if text[: ends[0]].endswith(one))
    assert stop.stopped
    assert shown == text[: ends[0] - longest]


def test_nothing_of_a_stop_string_shows_early():
    stop = StopStrings(["\n\nEND"])
    assert [stop.push(piece) for piece in ["a\n", "\nE", "N", "x", "\n\nEN", "D tail", "more"]] == [
        "a",
        "",
        "",
        "\n\nENx",
        "",
        "",
        "",
    ]
    assert stop.finish() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="at least one character"):
        StopStrings(["a", ""])
