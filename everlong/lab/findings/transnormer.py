"""The two findings of "The Devil in Linear Transformer" (Qin et al. 2022, arXiv 2210.10340), on a text of one's own.

    python -m everlong.lab.findings.transnormer [--data FILE] [--out FOLDER] [--steps N] [--seed N]

Trains three byte models that differ in their attention only: softmax, linear attention with 1 + elu, and TransNormer.
Measured are the gradients while they learn, the gradient of attention weights with respect to their scores, and how
far each layer looks. docs/findings/transnormer.md says what to read from it.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, pstdev

import torch
from torch import Tensor

from everlong.data.sources import STDLIB, documents
from everlong.lab.chart import Panel, chart, smoothed
from everlong.lab.diagnostics import GradientBound, attention_map, dilution_curve, gradient_bound_report
from everlong.mixers.base import Mixer
from everlong.models.lm import Block, LanguageModel, ModelConfig
from everlong.nn.positions import Learned

MODELS = {"softmax": "attention", "linear, 1 + elu": "linear_attention", "TransNormer": "transnormer"}
SCORES = (1.0, 1e-2, 1e-4, 1e-6, 1e-8)
BYTES = 4_000_000  # of the text at most


@dataclass(frozen=True)
class Setting:
    """What is trained, and on how much."""

    steps: int = 900
    length: int = 256
    batch: int = 8
    width: int = 64
    layers: int = 4
    heads: int = 4
    learning_rate: float = 4e-3
    seed: int = 0


@dataclass
class Run:
    """What was seen of one model."""

    loss: list[float] = field(default_factory=list)  # nats a byte
    gradient: list[float] = field(default_factory=list)  # norm of that of the queries' and keys' weights, all layers
    bounds: list[list[GradientBound]] = field(default_factory=list)  # of each layer, after training
    dilution: list[Tensor] = field(default_factory=list)  # l(r) of each layer, after training

    def spread(self) -> tuple[float, float, float]:
        """Of the second half's gradients: standard deviation / mean, largest / median, and the median.

        The first is that of 25 updates, in the mean over such spans: a slow change is no spread.
        """
        late = self.gradient[len(self.gradient) // 2 :]
        spans = [late[i : i + 25] for i in range(0, len(late), 25)]
        return fmean(pstdev(span) / fmean(span) for span in spans), max(late) / median(late), median(late)


def batches(text: Tensor, setting: Setting) -> Iterator[tuple[Tensor, Tensor]]:
    """The same for each model: windows of the text and what follows each byte."""
    random = torch.Generator().manual_seed(setting.seed)
    for _ in range(setting.steps):
        start = torch.randint(len(text) - setting.length, (setting.batch, 1), generator=random)
        windows = text[start + torch.arange(setting.length + 1)]
        yield windows[:, :-1], windows[:, 1:]


def make(mixer: str, setting: Setting) -> LanguageModel:
    """A byte model whose layers know positions from a vector for each."""
    torch.manual_seed(setting.seed)
    layer = {"mixer": mixer, "num_heads": setting.heads, "position": "none"}
    config = ModelConfig(
        vocab_size=256,
        width=setting.width,
        num_layers=setting.layers,
        layers=(layer,),
        learned_positions=setting.length,
    )
    model = LanguageModel(config)
    assert model.positions is not None
    assert isinstance(model.positions, Learned)
    for embedding in (model.embedding, model.positions):
        torch.nn.init.normal_(embedding.weight, std=0.1)  # five times the usual: attention sees positions earlier
    return model


def mixers_of(model: LanguageModel) -> list[Mixer]:
    """One for each layer."""
    return [block.mixer for block in model.blocks if isinstance(block, Block)]


def train(model: LanguageModel, text: Tensor, setting: Setting) -> Run:
    """Updates without clipping, which would hide what is to be seen."""
    run = Run()
    scoring = [p for mixer in mixers_of(model) for name in ("q", "k") for p in mixer.get_submodule(name).parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, betas=(0.9, 0.95))
    for step, (tokens, targets) in enumerate(batches(text, setting)):
        for group in optimizer.param_groups:
            group["lr"] = setting.learning_rate * min(1.0, (step + 1) / 20)
        loss = model.loss(tokens, targets)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        run.loss.append(loss.item())
        run.gradient.append(torch.stack([p.grad.norm() for p in scoring if p.grad is not None]).norm().item())
        optimizer.step()
    return run


@torch.no_grad()
def inspect(model: LanguageModel, tokens: Tensor, ratios: Tensor, run: Run) -> None:
    """How far each layer looks, and what its queries, keys and values would make of each kind of attention."""
    read: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])) for m in mixers_of(model)]
    model.hidden(tokens)
    for hook in hooks:
        hook.remove()
    for mixer, x in zip(mixers_of(model), read, strict=True):
        maps = torch.stack([attention_map(mixer, row) for row in x])
        run.dilution.append(dilution_curve(maps, ratios))
        heads = (mixer.get_submodule(name)(x).unflatten(-1, (mixer.config.heads, -1)).transpose(1, 2) for name in "qkv")
        with torch.enable_grad():
            run.bounds.append(gradient_bound_report(*heads))


def growth(scores: Sequence[float] = SCORES, keys: int = 16) -> list[dict[str, float]]:
    """The largest gradients where all of a query's scores shrink together, in any of the three kinds of attention.

    Queries and keys are chosen so that 1 + elu gives these scores: the product of two features of the score's root.
    """
    random = torch.Generator().manual_seed(0)
    v = torch.randn(keys, 8, generator=random)
    rows = []
    for score in scores:
        feature = (score * (1 + torch.rand(keys, 1, generator=random))).sqrt()
        x = torch.where(feature > 1, feature - 1, feature.log())  # 1 + elu of it is the feature
        found = gradient_bound_report(x, x, v, causal=False)
        rows.append({"score": score, **{bound.kind: bound.largest for bound in found}})
    return rows


def measure(text: Tensor, setting: Setting, shares: int = 20) -> tuple[dict[str, Run], Tensor]:
    """Trains each model and looks into it. Also the shares r for which l(r) is given."""
    ratios = torch.linspace(1 / shares, 1, shares)
    held_out, text = text[: 4 * setting.length].view(4, -1), text[4 * setting.length :]
    runs = {}
    for name, mixer in MODELS.items():
        model = make(mixer, setting)
        runs[name] = train(model, text, setting)
        inspect(model, held_out, ratios, runs[name])
    return runs, ratios


def pictures(runs: dict[str, Run], ratios: Tensor) -> dict[str, str]:
    """SVG drawings by the names of their files."""

    def points(values: Sequence[float]) -> list[tuple[float, float]]:
        return [(float(step), value) for step, value in enumerate(values, 1)]

    def curves(layer: int) -> dict[str, list[tuple[float, float]]]:
        return {
            name: list(zip(ratios.tolist(), run.dilution[layer].tolist(), strict=True)) for name, run in runs.items()
        }

    norms = {name: points([torch.tensor(g).log10().item() for g in run.gradient]) for name, run in runs.items()}
    losses = {name: points(run.loss) for name, run in runs.items()}
    return {
        "transnormer-gradients.svg": chart(
            "Three models that differ in their attention, while they learn",
            [
                Panel("log10 of the gradient's norm, q and k", {n: smoothed(p) for n, p in norms.items()}, faint=norms),
                Panel("loss, nats per byte", {name: smoothed(line) for name, line in losses.items()}),
            ],
            x_label="updates",
        ),
        "transnormer-dilution.svg": chart(
            "How much of the attention falls on the nearest tokens",
            [Panel("first layer", curves(0)), Panel("last layer", curves(-1))],
            x_label="share of the tokens that a query sees",
        ),
    }


def report(runs: dict[str, Run], ratios: Tensor) -> Iterator[str]:
    """The numbers, line by line."""
    yield "largest gradient where all scores of a query are about s"
    yield f"{'s':>12} {'|dp/ds| softmax':>18} {'|dp/ds| linear':>18} {'|dL/ds| norm':>18}"
    for row in growth():
        yield f"{row['score']:12g} {row['softmax']:18.3g} {row['linear']:18.3g} {row['norm']:18.3g}"
    yield ""
    yield "gradient of queries' and keys' weights in the second half of training"
    yield f"{'model':>18} {'median norm':>12} {'std / mean':>11} {'max / median':>13} {'last loss':>10}"
    for name, run in runs.items():
        relative, peak, middle = run.spread()
        yield f"{name:>18} {middle:12.3g} {relative:11.2f} {peak:13.1f} {fmean(run.loss[-20:]):10.3f}"
    yield ""
    yield "largest |dp/ds| that each trained layer's queries and keys give, as softmax and as linear attention"
    for name, run in runs.items():
        largest = ["/".join(f"{bound.largest:.2g}" for bound in bounds[:2]) for bounds in run.bounds]
        yield f"{name:>18} " + "  ".join(f"{value:>12}" for value in largest)
    yield ""
    near = int((ratios - 0.25).abs().argmin())
    yield f"l({ratios[near]:.2f}) of each layer: a map that does not tell near from far has {ratios[near]:.2f}"
    for name, run in runs.items():
        yield f"{name:>18} " + "  ".join(f"{curve[near]:12.2f}" for curve in run.dilution)


def load_text(source: str) -> Tensor:
    """Bytes of a file, or of Python's standard library."""
    held = bytearray()
    for document in documents([source]):
        held += document.text.encode()
        if len(held) >= BYTES:
            break
    return torch.frombuffer(held[:BYTES], dtype=torch.uint8).long()


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the numbers and writes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=STDLIB, help="a text, or python-stdlib")
    parser.add_argument("--out", type=Path, default=Path("."), help="the folder for the pictures")
    parser.add_argument("--steps", type=int, default=Setting.steps, help="updates of each model")
    parser.add_argument("--seed", type=int, default=Setting.seed, help="of weights and batches")
    chosen = parser.parse_args(arguments)
    runs, ratios = measure(load_text(chosen.data), Setting(steps=chosen.steps, seed=chosen.seed))
    print("\n".join(report(runs, ratios)))
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name, drawing in pictures(runs, ratios).items():
        (chosen.out / name).write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main()
