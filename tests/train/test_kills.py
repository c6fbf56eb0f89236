"""A run that was killed and one that was not end with the same bits."""

import random
import time

import pytest
from training_runs import check_same, spawn

from everlong.train import checkpoint, compilation

# Two threads and tensors large enough for both: sums that depend on the threads' order would show.
HYBRID = ("layers=gated_deltanet,attention", "width=64", "batch_tokens=1024", "length=64", "threads=2")
OFTEN = ("checkpoint_every=2", "evaluate_every=5", "evaluate_tokens=2000", "final_tokens=2000")
needs_compiler = pytest.mark.skipif(compilation.obstacle() is not None, reason=str(compilation.obstacle()))


def killed(prepared, run, chance, steps, *options):
    """Kills a training at a random instant after its first checkpoint; the step that it had begun at."""
    process = spawn(prepared, run, *options)
    began = int(process.stdout.readline())
    last = began + 3 + chance.randrange((steps - began) // 3)
    for line in process.stdout:
        if int(line) >= last:
            time.sleep(chance.random() * 0.02)
            process.kill()
            break
    process.stdout.close()
    process.wait()
    return began


def check_kills(prepared, folder, seed, *options, kills, steps):
    chance, options = random.Random(seed), (f"steps={steps}", *OFTEN, *HYBRID, *options)
    whole = spawn(prepared, folder / "whole", *options)
    began = [killed(prepared, folder / "killed", chance, steps, *options) for _ in range(kills)]
    last = spawn(prepared, folder / "killed", *options)
    began.append(int(last.communicate()[0].split()[0]))
    assert last.returncode == 0
    assert whole.communicate()[0].startswith("0\n")
    assert whole.returncode == 0
    print(f"killed {kills} times, went on from steps {began[1:]} of {steps}")
    assert all(0 < step < steps for step in began[1:])
    check_same(folder / "whole", folder / "killed")
    assert checkpoint.latest(folder / "killed" / "training").checkpoint.step == steps


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_killed_and_resumed_it_ends_with_the_same_bits(prepared, tmp_path, precision):
    check_kills(prepared, tmp_path, 0, f"precision={precision}", kills=1, steps=12)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("seed", range(1, 5))
def test_killed_often_it_ends_with_the_same_bits(prepared, tmp_path, seed, precision):
    check_kills(prepared, tmp_path, seed, f"precision={precision}", kills=3, steps=60)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_killed_when_compiled_it_ends_with_the_same_bits(prepared, tmp_path, precision):
    check_kills(prepared, tmp_path, 9, f"precision={precision}", "compile=on", kills=2, steps=200)
