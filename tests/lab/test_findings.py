"""The findings run at a tiny size, and show what their papers say."""

import itertools
import xml.etree.ElementTree as ET

import torch

from everlong.lab.findings import hippo, transnormer


def test_the_findings_of_transnormer(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, the dog on the log. " * 400, encoding="utf-8")
    transnormer.main(["--data", str(text), "--out", str(tmp_path / "out"), "--steps", "4"])
    printed = capsys.readouterr().out
    for name in transnormer.MODELS:
        assert printed.count(f"{name:>18} ") >= 3
    drawings = sorted((tmp_path / "out").iterdir())
    assert [drawing.suffix for drawing in drawings] == [".svg", ".svg"]
    for drawing in drawings:
        assert ET.parse(drawing).getroot().tag.endswith("svg")


def test_gradients_grow_in_linear_attention_alone():
    rows = transnormer.growth()
    assert all(row["softmax"] <= 0.25 for row in rows)
    for before, after in itertools.pairwise(rows):
        assert after["linear"] > 50 * before["linear"]  # a hundredth of the score, a hundred times the gradient
    assert rows[-1]["norm"] < 2 * rows[-2]["norm"]  # the norm's eps has taken over


def test_blocks_look_nearby_before_any_training():
    setting = transnormer.Setting(length=256, layers=2, width=16)
    ratios, tokens = torch.tensor([0.5]), torch.randint(256, (2, 256), generator=torch.Generator().manual_seed(0))
    shares = {}
    for name, mixer in transnormer.MODELS.items():
        run = transnormer.Run()
        transnormer.inspect(transnormer.make(mixer, setting), tokens, ratios, run)
        shares[name] = [curve.item() for curve in run.dilution]
    first, last = shares["TransNormer"]
    assert first > 0.9
    assert all(abs(share - 0.5) < 0.05 for share in (last, *shares["linear, 1 + elu"]))


def test_what_hippo_remembers(tmp_path, capsys):
    hippo.main(["--out", str(tmp_path / "out"), "--samples", "256", "--order", "16"])
    table = capsys.readouterr().out.splitlines()
    errors = {int(line.split()[0]): [float(value) for value in line.split()[1:]] for line in table[2:7]}
    assert list(errors) == list(hippo.ORDERS)
    legs, legt, _ = zip(*errors.values(), strict=True)
    assert list(legs) == sorted(legs, reverse=True)
    assert legt[3] < 0.02 < 0.1 < legt[1]  # pi numbers for each of the window's five periods
    rules = {line.split()[0]: float(line.split()[2]) for line in table[-3:]}
    assert rules["bilinear"] < 0.2 * min(rules["forward"], rules["backward"])
    assert ET.parse(tmp_path / "out" / "hippo.svg").getroot().tag.endswith("svg")
