"""Bad input, as a table: what somebody types, and what the one line on standard error must say about it.

Each row is run in a folder of good and of broken things, and must end with exit code 2, one line on standard error,
nothing on standard output, and every file as it was. No progress shows: all of this is told before any long work.
"""

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import broken_things
import pytest

from everlong.cli.main import main

TRAIN = "train --data text.txt --out new"
GENERATE = "generate run --prompt a"

COMMANDS = {
    "trian": "unknown command `trian`. Nearest: `train`. There is: bench, demo, doctor, ",
    "--json trian": "unknown command `trian`. Nearest: `train`",
    "--versoin": "unknown option `--versoin`. Nearest: `--version`",
    "''": "unknown command ``",
    "doctor now": "nothing takes the word `now`. See `everlong doctor --help`",
    "doctor --fix": "unknown option `--fix`",
    "mixers --json=1": "`--json` takes no value: got `1`",
    "bench": "needs `SUITE`",
    "bench opps": "`SUITE` must be one of ops, mixers, train, decode: got `opps`. Nearest: `ops`",
    "bench ''": "`SUITE` must not be empty",
    "bench ops decode": "nothing takes the word `decode`",
    "bench ops --only": "`--only` needs a value",
    "bench decode --only nothing": "no measure contains `nothing`. There is: time per token, ",
    "explain": "needs `NAME`",
    "explain ''": "`NAME` must not be empty",
    "explain mambo": "`mambo` is no mixer and no folder. Nearest: `mamba`. The mixers are: attention, ",
    "explain text.txt": "text.txt is no run: it is a file",
    "explain folder": "folder is no run: it has no config.json",
    "explain data": "data is no run: it is prepared data. `everlong train --data data --mixer NAME --out RUN`",
    "explain attention:num_heads=7": "`everlong explain attention` lists them",
    "explain :": "mixer `:` cannot be loaded",
    "demo --minutes 0": "`minutes` must be above 0: got 0.0",
    "demo --minutes nan": "`minutes` must be a finite number: got nan",
    "demo --minutes soon": "`--minutes` takes a number: got `soon`",
    "demo --seed -1": "`seed` must be at least 0 and below 2^63: got -1",
    "demo --out ''": "`--out` must not be empty",
    "demo --out text.txt/demo": "cannot be made, for ",
    "demo --out data": "`data` holds prepared data: name another folder",
}

SOURCES = {
    "nowhere": "there is no file or folder `nowhere`",
    "txt.txt": "there is no file or folder `txt.txt`. Nearest: `text.txt`",
    "python-stdlb": "Nearest: `python-stdlib`",
    "empty.txt": "`empty.txt` has no text in it: the file is empty",
    "latin.txt": "`latin.txt` is not UTF-8 text: byte 0xf6 at offset 2",
    "wide.txt": "`wide.txt` is not UTF-8 text: byte 0xff at offset 0 (invalid start byte). `iconv -f UTF-16 -t UTF-8`",
    "binary": "`binary` is not UTF-8 text: byte 0x80 at offset 128",
    "nul.txt": "`nul.txt` is binary, not text: byte 0x00 at offset 3",
    "cut.txt.gz": "`cut.txt.gz` is damaged or cut short",
    "no.txt.gz": "`no.txt.gz` is damaged or cut short",
    "no.txt.xz": "`no.txt.xz` is damaged or cut short",
    "no.txt.bz2": "`no.txt.bz2` is damaged or cut short",
    "no.txt.zst": "`no.txt.zst` is damaged or cut short",
    "broken.jsonl": "line 2 of `broken.jsonl` is no JSON object: Expecting ',' delimiter at column 13",
    "array.json": "line 1 of `array.json` must be a JSON object: got a list. `jq -c .[]` makes lines of an array",
    "pretty.json": "line 1 of `pretty.json` is no JSON object: Expecting value at column 2. `jq -c .[]`",
    "number.jsonl": "line 2 of `number.jsonl` must be a JSON object: got a number",
    "null.jsonl": "`text` in line 2 of `null.jsonl` must be a text: got null",
    "list.jsonl": "`text` in line 1 of `list.jsonl` must be a text: got a list",
    "other.jsonl": "line 2 of `other.jsonl` has no text field `text`. Nearest: `txet`. It has: txet (--text-field",
    "blank.jsonl": "`blank.jsonl` has no text in it: all of its rows are empty",
    "half.jsonl": "`text` in line 1 of `half.jsonl` has half of a surrogate pair",
    "deep.jsonl": "line 1 of `deep.jsonl` is no JSON object",
    "table.parquet": "`table.parquet` has no text field `text`. It has: body, n (--text-field names the field)",
    "table.parquet --text-field bdy": "no text field `bdy`. Nearest: `body`",
    "table.parquet --text-field n": "`n` in row 1 of `table.parquet` must be a text: got a number",
    "cut.parquet": "`cut.parquet` is no whole Parquet file",
    "no.parquet": "`no.parquet` is no whole Parquet file",
    "folder": "`folder/b.txt` is not UTF-8 text",
    "hollow": "`hollow` has no text in it: the folder holds no files. Text files, .jsonl and .parquet are read",
    "run": "`run` has no text in it: the folder holds 4 .json, 1 .safetensors",
}

PREPARE = {
    "prepare": "needs `--out PATH`",
    "prepare --out out": "no source is given",
    "prepare text.txt": "needs `--out PATH`",
    "prepare text.txt --out": "`--out` needs a value",
    "prepare '' --out out": "`SOURCES` must not be empty",
    "prepare text.txt --out ''": "`--out` must not be empty",
    "prepare text.txt --out=": "`--out` must not be empty",
    "prepare text.txt --out text.txt": "`text.txt` is a file: name a folder",
    "prepare text.txt --out text.txt/a/b": "`text.txt/a/b` cannot be made, for ",
    "prepare text.txt --out folder": "`folder` holds something else (a.txt, b.txt): name a new folder",
    "prepare text.txt --out data": "`data` is prepared already, with vocab_size 257, not 4096",
    "prepare text.txt --out cut-data": "has 27004 bytes instead of 27014. Remove the folder",
    "prepare text.txt ./text.txt --out out": "a source must be given once: `text.txt` is given 2 times",
    "prepare text.txt --out out --out out2": "`--out` must be given once",
    "prepare text.txt --out out --vocab-sise 300": "unknown option `--vocab-sise`. Nearest: `--vocab-size`",
    "prepare text.txt -o out": "unknown option `-o`. Nearest: `--out`",
    "prepare text.txt --out out --vocab-size 10": "`vocab_size` must be at least 257, all bytes and the end token",
    "prepare text.txt --out out --vocab-size -5": "`vocab_size` must be at least 257",
    "prepare text.txt --out out --vocab-size 1e3": "`--vocab-size` takes a whole number: got `1e3`",
    "prepare text.txt --out out --vocab-size 99999999999999999999": "`vocab_size` must be at most 1,048,576",
    "prepare text.txt --out out --held-out 2": "`held_out` must be a share from 0 to 1: got 2.0",
    "prepare text.txt --out out --held-out nan": "`held_out` must be a share from 0 to 1: got nan",
    "prepare text.txt --out out --held-out 1e400": "`held_out` must be a share from 0 to 1: got inf",
    "prepare text.txt --out out --held-out 10%": "`--held-out` takes a number: got `10%`",
    "prepare text.txt --out out --held-out 1": "nothing is left to train a tokenizer on",
    "prepare text.txt --out out --seed -1": "`seed` must be at least 0 and below 2^63: got -1",
    "prepare text.txt --out out --tokenizer nowhere": "there is no tokenizer at `nowhere`",
    "prepare text.txt --out out --tokenizer text.txt": "`text.txt` cannot be used: this is no tokenizer.json",
    "prepare text.txt --out out --tokenizer ''": "`--tokenizer` must not be empty",
}

LAYERS = {
    "--mixer mambo": "unknown mixer `mambo`. Nearest: `mamba`. There is: attention, ",
    "--mixer ''": "`--mixer` must not be empty",
    "--layers ''": "`--layers` must not be empty",
    "--layers ,": "needs `--mixer NAME` or `--layers a,b,...`",
    "--mixer attention --layers mamba2": "needs `--mixer NAME` or `--layers a,b,...`, one of them",
    "--mixer attention:num_heads=7": "`width` must be a multiple of `num_heads`: got width=256, num_heads=7. Nearest",
    "--mixer attention:num_heads=0": "`width` and `num_heads` must be positive",
    "--mixer attention:num_heads=many": "`num_heads` of attention must be a whole number: got 'many'",
    "--mixer attention:num_heads=": "`num_heads` of attention must be a whole number: got ''",
    "--mixer attention:num_heads": "an option of a layer is written as key=value: got `num_heads`",
    "--mixer attention:=7": "an option of a layer is written as key=value: got `=7`",
    "--mixer attention:num_haeds=8": "unknown option of attention `num_haeds`. Nearest: `num_heads`",
    "--mixer attention:window=8:window=9": "an option of a layer must be given once: `window`",
    "--mixer attention:window=0": "`window` must be at least 1",
    "--mixer attention:width=64": "`width` is the model's, one for all layers: got 256",
    "--mixer attention:causal=false": "causal=False sees the tokens that it is to predict",
    "--mixer linformer": "linformer, which is bidirectional only, sees the tokens that it is to predict",
    "--layers attention,linformer:slots=8": "a layer of linformer, which is bidirectional only,",
    "--mixer linformer:causal=true": "every token sees those after it: leave out `causal`, or take one of attention, ",
    "--mixer attention:mixer=mamba2": "a layer has one mixer, which stands first",
    "--mixer attention:position=ropee": "unknown position encoding `ropee`. Nearest: `rope`",
    "--mixer linear_attention:position=alibi": "has no score bias for the position encoding `alibi`. It takes: none",
    "--mixer linear_attention:feature_map=eluu": "unknown feature map `eluu`. Nearest: `elu`",
    "--mixer mamba2:num_heads=7": "`width * expansion` must be a multiple of `num_heads`",
    "--mixer mamba2:expansion=0": "`expansion` must leave at least one channel",
    "--mixer gated_deltanet:key_size=0": "`key_size` must be at least 1",
    "--mixer lacking:Mixer": "mixer `lacking:Mixer` cannot be loaded: No module named 'nothing_at_all'",
    "--mixer broken:Mixer": "mixer `broken:Mixer` cannot be loaded: SyntaxError",
    "--mixer failing:Mixer": "cannot be loaded: RuntimeError in two lines at ",
    "--mixer partial:Partial": "`partial:Partial` is no whole mixer, it lacks Config, traits, cost, forward",
    "--mixer os:path": "`os:path` is not derived from everlong.mixers.Mixer",
}

SETTINGS = {
    "--width 0": "`width` must be at least 1: got 0",
    "--width 1e3": "`--width` takes a whole number: got `1e3`",
    "--width 1000000": "parameters takes at least 576,052 GB while it is trained",
    "--width 99999999999999999999": "`width` must be at most 1,048,576",
    "--num-layers 0": "`num_layers` must be at least 1",
    "--num-layers 1000000000": "`num_layers` must be at most 4,096",
    "--vocab-size 10": "`vocab_size` must be at least 257",
    "--steps 0": "`steps` must be at least 1: got 0",
    "--steps 1e9": "`--steps` takes a whole number: got `1e9`",
    "--steps 5 --steps 6": "`--steps` must be given once",
    "--step 5": "unknown option `--step`. Nearest: `--steps`",
    "--minutes 0": "`minutes` must be above 0",
    "--minutes 1e400": "`minutes` must be a finite number: got inf",
    "--length 0": "`length` must be at least 1",
    "--length 100": "`batch_tokens` must be a multiple of `length`: got batch_tokens=4096, length=100. Nearest: 4000",
    "--length 65536 --batch-tokens 65536": "a row needs 65537 tokens, its length and one: the split has",
    "--batch-tokens 1000": "`batch_tokens` must be a multiple of `length`",
    "--micro-batch 3": "`batch_tokens / length` must be a multiple of `micro_batch`",
    "--learning-rate -1": "`learning_rate` must not be negative",
    "--learning-rate nan": "`learning_rate` must be a finite number: got nan",
    "--clip nan": "`clip` must be a finite number: got nan",
    "--clip 0": "`clip` must be above 0",
    "--warmup -1": "`warmup` must not be negative",
    "--decay 2": "`decay` is a fraction of the run, from 0 to 1",
    "--seed -1": "`seed` must be at least 0 and below 2^63",
    "--precision fp16": "`--precision` must be one of auto, bf16, float32: got `fp16`. Nearest: `bf16`",
    "--optimizer adam": "Nearest: `adamw`",
    "--keep 0": "`keep` must be at least 1",
    "--resume=yes": "`--resume` takes no value: got `yes`",
    "--resume --overwrite": "give one of them",
    "extra": "nothing takes the word `extra`",
}

TRAINING = {
    f"{TRAIN} --mixer mamba2 --learned-positions 64": "`length` must be at most the model's learned positions",
    "train": "needs `--out RUN`",
    "train --mixer attention --out new": "needs `--data`: a prepared folder, a text file, a folder of texts, or",
    "train --data text.txt --out new": "needs `--mixer NAME` or `--layers a,b,...`",
    "train --data '' --mixer attention --out new": "`--data` must not be empty",
    "train --data text.txt --mixer attention --out ''": "`--out` must not be empty",
    "train --data text.txt --mixer attention --out text.txt": "`text.txt` is a file: name a folder",
    "train --data text.txt --mixer attention --out text.txt/new": "cannot be made, for ",
    "train --data text.txt --mixer attention --out run": "run holds model.safetensors, which no training of its own",
    "train --data text.txt --mixer attention --out data --overwrite": "`data` holds prepared data",
    "train --data short.txt --mixer attention --out a/b": "a row needs 513 tokens, its length and one",
    "train --data cut-data --mixer attention --out new": "has 27004 bytes instead of 27014",
    "train --data listed-data --mixer attention --out new": "`listed-data/dataset.json` cannot be used",
    "train --data swapped-data --mixer attention --out new": "has 7665 bytes instead of 4994",
    "train --out run --resume": "run holds no training to go on with",
    "train --out unset --resume": "unset/training/settings.json is damaged: it does not say data or model or train",
}

RUNS = {
    "nowhere": "nowhere is no run: there is no such folder",
    "rum": "rum is no run: there is no such folder. Nearest: `run`",
    "text.txt": "text.txt is no run: it is a file",
    "''": "`RUN` must not be empty",
    "folder": "folder is no run: it has no config.json",
    "data": "data is no run: it is prepared data",
    "begun": "begun is no run: its training has not saved a model yet. `everlong train --out begun --resume`",
    "cut-weights": "cut-weights/model.safetensors is damaged",
    "no-weights": "no-weights has no model.safetensors",
    "wider-weights": "`embedding.weight` must be (257, 16) by the config, got (257, 32). They are the weights",
    "mixed-weights": "They are the weights of another model",
    "no-json": "no-json/config.json is no JSON",
    "listed": "listed/config.json must be a JSON object: got [1]",
    "transformer": "transformer/config.json describes a `gpt2` model: a run of everlong is needed",
    "unknown-mixer": "unknown-mixer/config.json describes no model: unknown mixer `mambo`. Nearest: `mamba`",
    "unknown-key": "unknown option of ModelConfig `widht`. Nearest: `width`",
    "worded": "`width` of ModelConfig must be a whole number: got 'wide'",
    "numbered": "`layers.0` of ModelConfig must be a text or a mapping: got 7",
    "unsized": "`vocab_size` of ModelConfig is missing",
    "huge": "`width` must be at most 1,048,576",
    "no-tokenizer": "no-tokenizer has no tokenizer.json",
    "broken-tokenizer": "`broken-tokenizer/tokenizer.json` cannot be used",
    "binary-tokenizer": "`binary-tokenizer/tokenizer.json` is no tokenizer: it is not UTF-8 text, from offset 0 on",
    "larger-tokenizer": "the tokenizer in larger-tokenizer is not that of its model: it has 300 tokens",
    "listed-settings": "`listed-settings/tokenizer_config.json` must be a JSON object",
    "endless-settings": "`eos_token` of tokenizer_config.json is ['a'], which is not in the vocabulary",
}

GENERATION = {
    "generate": "needs `RUN`",
    "generate run": "give the text to continue by one of `--prompt TEXT`, `--prompt -` and `--prompt-file FILE`",
    "generate run --prompt": "`--prompt` needs a value",
    "generate run --promt a": "unknown option `--promt`. Nearest: `--prompt`",
    "generate run --prompt a --prompt b": "`--prompt` must be given once",
    "generate run --prompt a --prompt-file text.txt": "give the text to continue by one of",
    "generate run --prompt-file binary": "binary is no UTF-8 text: byte 0x80 at offset 128",
    "generate run --prompt-file nowhere": "nowhere: no such file or directory",
    "generate run --prompt-file folder": "folder: is a directory",
    "generate run --prompt-file ''": "`--prompt-file` must not be empty",
    "generate run --prompt -": "standard input is no UTF-8 text: byte 0xff at offset 0",
    "generate run --prompt \udcff": "a text holds half a surrogate pair",
    f"{GENERATE} --stop ''": "`--stop` must not be empty",
    "generate positions --prompt 'more than eight'": "learned 8 positions: got a prompt of 15 tokens, and",
    f"{GENERATE} --temperature -1": "`temperature` must be at least 0 (0 is greedy) and finite: got -1.0",
    f"{GENERATE} --temperature 1e400": "`temperature` must be at least 0 (0 is greedy) and finite: got inf",
    f"{GENERATE} --top-p 2": "`top_p` must be above 0 and at most 1, or left out: got 2.0",
    f"{GENERATE} --top-p nan": "`top_p` must be above 0 and at most 1",
    f"{GENERATE} --top-k 0": "`top_k` must be at least 1",
    f"{GENERATE} --top-k 1.5": "`--top-k` takes a whole number: got `1.5`",
    f"{GENERATE} --min-p -1": "`min_p` must be above 0 and at most 1",
    f"{GENERATE} --repetition-penalty 0": "`repetition_penalty` must be above 0",
    f"{GENERATE} --max-new-tokens 0": "`max_new_tokens` must be at least 1",
    f"{GENERATE} --seed -1": "`seed` must be at least 0 and below 2^63",
    f"{GENERATE} --json=yes": "`--json` takes no value: got `yes`",
}

EVALUATION = {
    "eval": "needs `RUN` and `--data SRC`",
    "eval run": "needs `--data SRC`",
    "eval run --data other-data": "prepared with another tokenizer than run: give the source itself to --data, or",
    "eval run --data trained-data": "`trained-data` has no heldout documents: prepare it with more --held-out",
    "eval positions --data data": "the model has learned 8 positions, and reads no longer text: got ",
    "eval run --data data --split test": "`--split` must be one of heldout, train, all: got `test`",
    "eval run --data data --length 0": "`length` must be at least 1: got 0",
    "eval run --data data --length 99999999999999999999": "`length` must be at most 1,099,511,627,776",
    "eval run --data data --stride 0": "`stride` must be at least 1: got 0",
    "eval run --data data --length 64 --stride 128": "`stride` must be from 1 to `length`: got stride=128, length=64",
    "eval run --data data --batch-size 0": "`batch_size` must be at least 1: got 0",
    "eval run --data data --max-tokens -1": "`max_tokens` must be at least 1",
    "eval run --data data --baselines=no": "`--baselines` takes no value: got `no`",
    "eval unset --data data": "unset/training/settings.json is damaged",
}

TABLE = {
    **COMMANDS,
    **{f"prepare {source} --out out": line for source, line in SOURCES.items()},
    **PREPARE,
    **{f"{TRAIN} {layers}": line for layers, line in LAYERS.items()},
    **{f"{TRAIN} --mixer attention {setting}": line for setting, line in SETTINGS.items()},
    **TRAINING,
    **{f"generate {run} --prompt a": line for run, line in RUNS.items()},
    **GENERATION,
    **EVALUATION,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("things")
    broken_things.make(folder)
    return folder


@pytest.fixture(autouse=True)
def _inside(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))


def everything(folder):
    """Every path below a folder, and of files when they were written."""
    return {path: path.stat().st_mtime_ns if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(("typed", "line"), TABLE.items(), ids=[typed.encode("ascii", "replace") for typed in TABLE])
def test_it_gets_one_line(typed, line, place, capsys):
    words, before = shlex.split(typed), everything(place)
    assert main(words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.endswith("\n")
    assert told.err.count("\n") == 1
    command = next((word for word in words if not word.startswith("-")), "")
    assert told.err.startswith((f"everlong {command}: ", "everlong: "))
    assert line in told.err
    assert everything(place) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="run as another user than root, whom permissions do not bind")
def test_what_may_not_be_read_or_written(tmp_path, capsys):
    secret, closed = tmp_path / "secret.txt", tmp_path / "closed"
    secret.write_text(broken_things.TEXT)
    secret.chmod(0)
    closed.mkdir(mode=0o500)
    assert main(["prepare", str(secret), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"everlong prepare: {secret}: permission denied\n"
    assert main(["prepare", "text.txt", "--out", str(closed / "out")]) == 2
    assert f"`{closed}` does not let you" in capsys.readouterr().err


def test_memory_that_there_is_not(monkeypatch, capsys):
    def full(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr("everlong.cli.generate.load", full)
    assert main(["generate", "run", "--prompt", "a"]) == 2
    assert capsys.readouterr().err.startswith("everlong generate: there is not enough memory")


@pytest.mark.parametrize("typed", ["trian", "prepare binary --out out"])
def test_as_a_process(typed, place):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    words = [sys.executable, "-m", "everlong", *shlex.split(typed)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, cwd=place, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert TABLE[typed] in done.stderr
    assert done.stderr.count("\n") == 1
