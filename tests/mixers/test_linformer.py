"""What is particular to Linformer: its longest text, what layers share, that it cannot be causal."""

import pytest
import torch

from everlong.config import from_dict
from everlong.mixers.base import Context
from everlong.mixers.linformer import Linformer, Options
from everlong.models.lm import LanguageModel, ModelConfig


def make(layer=0, depth=1, **options):
    torch.manual_seed(0)
    shape = {"width": 12, "num_heads": 2, "length": 20, "slots": 4}
    return Linformer(from_dict(Options, {**shape, **options}), layer=layer, depth=depth).double()


def model(*layers, num_layers=3):
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(vocab_size=9, width=12, num_layers=num_layers, layers=layers)).double()


SHARED = {"mixer": "linformer", "num_heads": 2, "length": 20, "slots": 4, "sharing": "layerwise"}


@pytest.mark.parametrize("projection", ["learned", "mean", "max", "convolution"])
def test_a_longer_text_is_refused(projection):
    mixer = make(projection=projection)
    mixer(torch.randn(2, 20, 12, dtype=torch.float64))
    with pytest.raises(ValueError, match="at most `length` tokens.*got 21, length=20. Make the layer with a greater"):
        mixer(torch.randn(1, 21, 12, dtype=torch.float64))
    x, bounds = torch.randn(1, 40, 12, dtype=torch.float64), torch.tensor([0, 20, 40])
    mixer(x, None, Context(cu_seqlens=bounds))  # each text has its own length
    with pytest.raises(ValueError, match="got 21"):
        mixer(x, None, Context(cu_seqlens=bounds + torch.tensor([0, 1, 0])))


def test_it_cannot_be_causal():
    with pytest.raises(ValueError, match="sees those after it: leave out `causal`, or take one of attention, "):
        Options(width=12, causal=True)


@pytest.mark.parametrize(
    ("sharing", "count"), [("none", 2 * 2), ("headwise", 2), ("key_value", 1), ("layerwise", 1), ("borrowed", 0)]
)
def test_what_is_shared_is_there_once(sharing, count):
    assert sum(weight.numel() for weight in make(sharing=sharing).projections) == count * 4 * 20
    kernels = make(sharing=sharing, projection="convolution").projections
    assert sum(weight.numel() for weight in kernels) == count * 5


@pytest.mark.parametrize("projection", ["learned", "convolution"])
def test_all_layers_have_the_first_ones_projection(projection):
    lm = model({**SHARED, "projection": projection})
    assert [len(block.mixer.projections) for block in lm.blocks] == [1, 0, 0]
    assert lm.cost(8).parameters == sum(parameter.numel() for parameter in lm.parameters())
    tokens = torch.randint(9, (2, 15))
    padding = torch.arange(15) >= torch.tensor([[4], [0]])
    (y, _), (alone, _) = lm.hidden(tokens, None, Context(padding=padding)), lm.hidden(tokens[:1, 4:])
    torch.testing.assert_close(y[:1, 4:], alone, atol=1e-9, rtol=1e-9)
    own = model({**SHARED, "projection": projection, "sharing": "key_value"})
    for block, other in zip(own.blocks, lm.blocks, strict=True):
        block.load_state_dict(other.state_dict(), strict=False)
        block.mixer.projections[0].data = lm.blocks[0].mixer.projections[0].data
    own.embedding.load_state_dict(lm.embedding.state_dict())
    torch.testing.assert_close(own.hidden(tokens)[0], lm.hidden(tokens)[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("projection", ["mean", "max"])
def test_windows_without_weights_need_no_first_layer(projection):
    lm = model("attention", {**SHARED, "projection": projection})
    assert lm.hidden(torch.randint(9, (1, 15)))[0].isfinite().all()


@pytest.mark.parametrize(
    ("first", "told"),
    [
        ("attention", "there is none"),
        ({**SHARED, "sharing": "key_value"}, "there is none"),
        ({**SHARED, "slots": 5}, r"it has \[1, 5, 20\] and not \[1, 4, 20\]"),
    ],
)
def test_a_projection_that_is_not_there_is_told(first, told):
    with pytest.raises(ValueError, match=f"the model's first layer, but {told}: make the .* or take sharing=key_value"):
        model(first, SHARED, num_layers=2).hidden(torch.randint(9, (1, 5)))
