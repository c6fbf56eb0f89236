"""transformers over every causal mixer: what it loads, generates, trains and saves is what everlong has."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import everlong
from everlong import mixers
from everlong.data.tokenizer import END, byte_tokenizer
from everlong.generate.sampling import Sampling
from everlong.mixers.attention import Attention
from everlong.models.lm import LanguageModel, ModelConfig
from everlong.models.run import load_config, load_tokenizer, save

transformers = pytest.importorskip("transformers", reason="pip install transformers")
# PEFT asks for this by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache  # noqa: E402

from everlong.interop.huggingface import EverlongConfig, EverlongForCausalLM, StateCache  # noqa: E402

transformers.utils.logging.disable_progress_bar()

VOCABULARY = 257


class Remembering(Attention):
    """A mixer from outside with buffers that are made anew at each start, and one that is saved."""

    def __init__(self, config, *, layer=0, depth=1):
        super().__init__(config, layer=layer, depth=depth)
        angles = torch.arange(1, config.width + 1, dtype=torch.float64) / (layer + 1)
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles).cfloat(), persistent=False)
        self.register_buffer("scales", torch.linspace(0.5, 2, config.width), persistent=False)
        self.register_buffer("shift", torch.zeros(config.width))

    def forward(self, x, state=None, context=mixers.base.Context()):
        y, state = super().forward(x, state, context)
        return y * (self.turns.real * self.scales).to(y.dtype) + self.shift, state


NAMES = [name for name in mixers.names() if mixers.load(name).traits.causal]
OUTSIDE = f"{__name__}:Remembering"
LAYERS = {name: (name,) for name in NAMES}
for part in range(4):  # all mixers in models of so few layers that float32 rounds to the tolerances below
    # An RWKV-7 comes first: behind other mixers the first of its kind has nobody's values to share.
    some = sorted(NAMES[part::4], key=lambda name: name != "rwkv7")
    LAYERS[f"hybrid {part}"] = (*some, {"mixer": "attention", "window": 3})
LAYERS["outside"] = (OUTSIDE,)
every = pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)


def build(layers, **options):
    """A small model whose next tokens are not all alike."""
    shape = ModelConfig(vocab_size=VOCABULARY, width=32, num_layers=max(2, len(layers)), layers=layers, **options)
    model = LanguageModel(shape)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o.weight", "down.weight")):
                weight.mul_(10)  # so that the embedding of the last token alone does not decide
        model.embedding.weight.mul_(5)
        for name, buffer in model.named_buffers():
            if name.endswith("shift"):
                buffer.fill_(0.25)
    return model.eval()


def save_run(folder, layers, **options):
    save(build(layers, **options), folder, byte_tokenizer())
    return folder


@pytest.fixture
def run(tmp_path, layers):
    return save_run(tmp_path / "run", layers)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """One run for the tests that do not depend on the mixer."""
    torch.manual_seed(0)
    return save_run(tmp_path_factory.mktemp("hybrid"), ("gated_deltanet", "attention"), learned_positions=512)


def tokens(batch=2, length=11):
    return torch.randint(0, 256, (batch, length))


def left_padded(prompts):
    longest = max(map(len, prompts))
    ids = torch.stack([F.pad(prompt, (longest - len(prompt), 0), value=256) for prompt in prompts])
    mask = torch.stack([F.pad(torch.ones_like(prompt), (longest - len(prompt), 0)) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@every
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_folders_are_read_both_ways(tmp_path, layers, tied):
    run = save_run(tmp_path / "run", layers, tie_embeddings=tied)
    theirs, found = AutoModelForCausalLM.from_pretrained(run, output_loading_info=True)
    assert isinstance(theirs, EverlongForCausalLM)
    assert not theirs.training
    assert not any(found.values())
    assert (theirs.head.weight is theirs.embedding.weight) == tied
    ids = tokens()
    ours = everlong.load(run)
    torch.testing.assert_close(logits(theirs, ids), logits(ours, ids), atol=1e-5, rtol=0)
    for name, value in ours.named_buffers():  # those that are not saved among them
        assert torch.equal(theirs.get_buffer(name), value)
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_config(tmp_path / "theirs") == load_config(run)
    assert load_file(tmp_path / "theirs" / "model.safetensors").keys() == load_file(run / "model.safetensors").keys()
    assert torch.equal(logits(everlong.load(tmp_path / "theirs"), ids), logits(ours, ids))


@every
def test_bfloat16(tmp_path, run):
    theirs = AutoModelForCausalLM.from_pretrained(run, dtype="bfloat16")
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.bfloat16}
    ids = tokens()
    theirs.save_pretrained(tmp_path / "theirs")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").dtype == torch.bfloat16
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype="float32")
    reference = logits(everlong.load(tmp_path / "theirs"), ids)
    torch.testing.assert_close(logits(exact, ids), reference, atol=1e-5, rtol=0)
    error = (logits(theirs, ids) - reference).norm() / reference.norm()
    assert error < 5e-2


@every
def test_new_models_have_our_weights(layers):
    shape = ModelConfig(vocab_size=50, width=32, num_layers=max(2, len(layers)), layers=layers)
    config = EverlongConfig(vocab_size=50, width=32, num_layers=max(2, len(layers)), layers=layers)
    assert config.model_config() == shape
    torch.manual_seed(3)
    expected = LanguageModel(shape).state_dict()
    for make in (EverlongForCausalLM, AutoModelForCausalLM.from_config):
        torch.manual_seed(3)
        made = make(config).state_dict()
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[name], value) for name, value in expected.items())


@every
def test_missing_weights_are_told_and_made_as_in_a_new_model(run, layers, caplog):
    weights = load_file(run / "model.safetensors")
    name = next(name for name in weights if name.startswith("blocks.1.mixer.") and name.endswith("o.weight"))
    del weights[name]
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})
    transformers.utils.logging.enable_propagation()
    try:
        theirs, found = AutoModelForCausalLM.from_pretrained(run, output_loading_info=True)
    finally:
        transformers.utils.logging.disable_propagation()
    assert found["missing_keys"] == {name}
    assert "MISSING" in caplog.text
    fresh = LanguageModel(load_config(run)).get_parameter(name)
    assert 0.8 < theirs.get_parameter(name).std() / fresh.std() < 1.25  # `o` starts smaller than other layers
    kept = [other for other in weights if other in dict(theirs.named_parameters())]
    assert all(torch.equal(theirs.get_parameter(other), weights[other]) for other in kept)


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 50},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
}


@every
def test_generation_with_a_cache_is_generation_without(run):
    model = AutoModelForCausalLM.from_pretrained(run)
    prompts = [tokens(1, length)[0] for length in (9, 1, 5)]
    together = left_padded(prompts)
    for mode in MODES.values():
        results = []
        for use_cache in (True, False):
            torch.manual_seed(1)
            results.append(model.generate(**together, max_new_tokens=8, use_cache=use_cache, **mode))
        assert torch.equal(*results)
        if not mode["do_sample"]:
            for row, prompt in enumerate(prompts):
                alone = model.generate(prompt[None], max_new_tokens=8, **mode)[0, len(prompt) :]
                assert torch.equal(results[0][row, 9 : 9 + len(alone)], alone)
    greedy = model.generate(**together, max_new_tokens=8, do_sample=False)
    in_chunks = model.generate(**together, max_new_tokens=8, do_sample=False, prefill_chunk_size=4)
    assert torch.equal(greedy, in_chunks)
    ours = everlong.generate(
        everlong.load(run),
        [prompt.tolist() for prompt in prompts],
        max_new_tokens=8,
        sampling=Sampling(temperature=0.0),
        stop_tokens=[256],
    )
    assert [row[: len(mine)] for row, mine in zip(greedy[:, 9:].tolist(), ours, strict=True)] == ours


@every
def test_a_cache_is_continued_branched_and_rearranged(run):
    model = AutoModelForCausalLM.from_pretrained(run)
    ids = tokens(3, 12)
    whole = logits(model, ids)
    with torch.no_grad():
        start = model(ids[:, :7]).past_key_values
        assert isinstance(start, StateCache)
        assert (start.get_seq_length(), start.batch_size) == (7, 3)
        branch = copy.copy(start)
        one = model(ids[:, 7:], past_key_values=start)
        assert one.past_key_values is start
        torch.testing.assert_close(one.logits, whole[:, 7:], atol=1e-5, rtol=1e-5)
        again = model(ids[:, 7:], past_key_values=copy.deepcopy(branch)).logits
        torch.testing.assert_close(again, whole[:, 7:], atol=1e-5, rtol=1e-5)
        order = torch.tensor([2, 0, 0, 1])
        for change, rows in (
            (lambda cache: cache.reorder_cache(order), order),
            (lambda cache: cache.batch_select_indices(order[:2]), order[:2]),
            (lambda cache: cache.batch_repeat_interleave(2), torch.arange(3).repeat_interleave(2)),
        ):
            changed = copy.copy(branch)
            change(changed)
            assert all(len(leaf) == len(rows) for leaf in pytree.tree_leaves(changed.state))
            after = model(ids[rows, 7:], past_key_values=changed).logits
            torch.testing.assert_close(after, whole[rows, 7:], atol=1e-5, rtol=1e-5)
    first = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    more = model.generate(first.sequences, max_new_tokens=3, do_sample=False, past_key_values=first.past_key_values)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(more, expected) or 256 in expected


def test_what_needs_a_shorter_cache_is_refused(hybrid):
    model = AutoModelForCausalLM.from_pretrained(hybrid)
    ids = tokens()
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids[:1], max_new_tokens=4, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="cannot be cut back, here by 2 tokens"):
        model(ids).past_key_values.crop(2)


def test_inputs_that_do_not_fit_are_answered(hybrid):
    model = AutoModelForCausalLM.from_pretrained(hybrid)
    ids = tokens()
    for wrong, message in (
        ({}, "either `input_ids` or `inputs_embeds`: got none"),
        ({"input_ids": ids, "inputs_embeds": model.embedding(ids)}, "got both"),
        ({"input_ids": ids, "past_key_values": DynamicCache()}, "must be a StateCache, or left out: got DynamicCache"),
        ({"input_ids": ids, "attention_mask": torch.ones(2, 1, 11, 11)}, "must be .batch, tokens., here \\(2, 11\\)"),
        ({"input_ids": ids, "output_attentions": True}, "`output_attentions` must be false"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**wrong)
    with pytest.raises(ValueError, match="does not support activation checkpointing"):
        model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="vocab_size"):
        EverlongConfig(width=8)
    with pytest.raises(ValueError, match="`num_layers` must be at least 1"):
        EverlongConfig(vocab_size=8, num_layers=0)


@every
def test_what_a_call_returns(run):
    model = AutoModelForCausalLM.from_pretrained(run)
    padded = left_padded([tokens(1, 11)[0], tokens(1, 4)[0]])
    with torch.no_grad():
        full = model(**padded, output_hidden_states=True)
        assert len(full.hidden_states) == model.config.num_hidden_layers + 1
        real = padded["attention_mask"].bool()
        alone = model(padded["input_ids"][1:, 7:], output_hidden_states=True)
        for one, other in zip(full.hidden_states, alone.hidden_states, strict=True):
            assert one.shape == (2, 11, model.config.hidden_size)
            torch.testing.assert_close(one[1:, 7:], other, atol=1e-5, rtol=1e-5)
        assert not full.hidden_states[0][~real].any()
        for keep, places in ((1, [10]), (3, [8, 9, 10]), (torch.tensor([2, 5]), [2, 5])):
            kept = model(**padded, logits_to_keep=keep).logits
            torch.testing.assert_close(kept, full.logits[:, places], atol=1e-5, rtol=1e-5)
        assert torch.equal(model(**padded, return_dict=False)[0], full.logits)
        embedded = model(inputs_embeds=model.embedding(padded["input_ids"]), attention_mask=padded["attention_mask"])
        assert torch.equal(embedded.logits, full.logits)
        assert model(**padded, use_cache=False).past_key_values is None
        assert model.train()(**padded).past_key_values is None


def test_the_loss_is_the_mean_over_the_next_tokens(hybrid):
    model = AutoModelForCausalLM.from_pretrained(hybrid)
    ids = tokens(4, 9)
    labels = ids.clone()
    labels[0, :5] = -100
    labels[3, 2:] = -100
    wanted = F.cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    whole = model(ids, labels=labels).loss
    torch.testing.assert_close(whole, wanted)
    torch.testing.assert_close(everlong.load(hybrid).loss(ids[:, :-1], labels[:, 1:]), wanted)
    count = (labels[:, 1:] != -100).sum()
    parts = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(4)]
    torch.testing.assert_close(sum(parts), wanted)


def test_configs_carry_both_vocabularies(hybrid, tmp_path):
    config = transformers.AutoConfig.from_pretrained(hybrid)
    assert isinstance(config, EverlongConfig)
    assert (config.hidden_size, config.num_hidden_layers, config.tie_word_embeddings) == (32, 2, True)
    assert (config.pad_token_id, config.eos_token_id) == (256, 256)
    config.some_setting_of_a_user = 3
    config.save_pretrained(tmp_path)
    assert load_config(tmp_path) == load_config(hybrid)  # what transformers writes beside our options is its own
    description = json.loads((hybrid / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**description, "num_layer": 3}))
    with pytest.raises(ValueError, match="Nearest: `num_layers`"):
        load_config(tmp_path)


def test_vocabularies_can_grow(hybrid, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(hybrid)
    ids = tokens()
    before = logits(model, ids)
    model.resize_token_embeddings(260)
    assert model.head.weight is model.embedding.weight
    torch.testing.assert_close(logits(model, ids)[..., :257], before, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(everlong.load(tmp_path), ids), logits(model, ids), atol=1e-5, rtol=1e-5)


def test_the_tokenizer(hybrid):
    theirs, ours = AutoTokenizer.from_pretrained(hybrid), load_tokenizer(hybrid)
    assert (theirs.pad_token, theirs.pad_token_id, theirs.padding_side) == (END, ours.end, "left")
    for text in ("Call me Ishmael.", "  two  spaces\n", "红楼梦 😀", ""):
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    batch = theirs(["a", "abc"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


def test_the_pipeline(hybrid):
    write = transformers.pipeline("text-generation", model=str(hybrid), device="cpu")
    (first,), (second,) = write(["Call me", "It"], max_new_tokens=5, do_sample=False, batch_size=2)
    for prompt, made in (("Call me", first), ("It", second)):
        (alone,) = write(prompt, max_new_tokens=5, do_sample=False)
        assert made["generated_text"] == alone["generated_text"]
        assert made["generated_text"].startswith(prompt)


@every
@pytest.mark.parametrize("targets", [["q", "v"], "all-linear"], ids=["q and v", "all"])
def test_lora_attaches_trains_and_merges(run, tmp_path, targets):
    peft = pytest.importorskip("peft", reason="pip install peft")
    model = AutoModelForCausalLM.from_pretrained(run)
    linear = {name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)} - {"head"}
    called = [name for name in linear if targets == "all-linear" or name.rpartition(".")[2] in targets]
    lora = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    if not called:  # recurrent networks and state spaces have no queries
        with pytest.raises(ValueError, match="not found in the base model"):
            peft.get_peft_model(model, lora)
        return
    tuned = peft.get_peft_model(model, lora)
    layers = [name for name, part in tuned.named_modules() if hasattr(part, "lora_A")]
    assert len(layers) == len(called)
    ids = tokens(2, 20)
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        missing = [n for n, p in tuned.named_parameters() if "lora_B" in n and not p.grad.any()]
        assert not missing, missing
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    adapted = logits(tuned.eval(), ids)
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for reader in (everlong.load, AutoModelForCausalLM.from_pretrained):
        torch.testing.assert_close(logits(reader(tmp_path / "merged"), ids), adapted, atol=1e-4, rtol=1e-4)


def trainer(model, folder, steps, **more):
    text = "the rain in spain stays mainly in the plain. " * 4
    data = [{"input_ids": list(text[start : start + 24].encode())} for start in range(64)]
    tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=6,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **more,
        ),
        train_dataset=data,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


def losses(trained):
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def test_trainer_trains_saves_and_resumes(hybrid, tmp_path):
    whole = trainer(AutoModelForCausalLM.from_pretrained(hybrid), tmp_path / "whole", 12)
    whole.train()
    seen = losses(whole)
    assert seen[-1] < 0.7 * seen[0]
    ids = tokens()
    trained = logits(whole.model.eval(), ids)
    torch.testing.assert_close(logits(everlong.load(tmp_path / "whole" / "checkpoint-12"), ids), trained)
    resumed = trainer(AutoModelForCausalLM.from_pretrained(hybrid), tmp_path / "whole", 12)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    torch.testing.assert_close(logits(resumed.model.eval(), ids), trained)


def test_accumulated_gradients_are_those_of_the_whole_batch(hybrid, tmp_path):
    results = []
    for size, parts in ((4, 1), (1, 4)):
        run = trainer(
            AutoModelForCausalLM.from_pretrained(hybrid),
            tmp_path,
            2,
            gradient_accumulation_steps=parts,
            save_strategy="no",
        )
        run.args.per_device_train_batch_size = run._train_batch_size = size
        run.train()
        results.append(losses(run))
    assert results[0] == pytest.approx(results[1], abs=1e-3)


def test_lm_eval_measures_what_everlong_measures(hybrid):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="pip install lm-eval")
    from lm_eval.api.instance import Instance

    judge = huggingface.HFLM(pretrained=str(hybrid), backend="causal", device="cpu", batch_size=2)
    pairs = [("Call me", " Ishmael."), ("a", "b c d"), ("", "a whole text")]
    requests = [Instance("loglikelihood", {}, pair, row) for row, pair in enumerate(pairs)]
    model, tokenizer = everlong.load(hybrid), load_tokenizer(hybrid)
    for (context, text), (found, _) in zip(pairs, judge.loglikelihood(requests), strict=True):
        before, after = tokenizer.encode(context) or [tokenizer.end], tokenizer.encode(text)
        chances = logits(model, torch.tensor([before + after])).log_softmax(-1)[0, len(before) - 1 : -1]
        assert found == pytest.approx(chances.gather(1, torch.tensor(after)[:, None]).sum().item(), abs=1e-4)


def test_the_manual_runs(hybrid, tmp_path, monkeypatch):
    """The Python of docs/huggingface.md, block after block; what needs lm-eval has a test of its own."""
    page = (Path(__file__).parents[2] / "docs" / "huggingface.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "lm_eval" not in block]
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/novel").symlink_to(hybrid)
    Path("novel.txt").write_text("\n\n".join(f"Call me Ishmael, number {n}." for n in range(40)))
    names = {}
    for block in blocks:
        exec(compile(block, "docs/huggingface.md", "exec"), names)
    ids = tokens()
    assert not torch.equal(logits(everlong.load("runs/merged"), ids), logits(everlong.load("runs/novel"), ids))
    assert load_tokenizer("runs/tuned").fingerprint == load_tokenizer(hybrid).fingerprint
