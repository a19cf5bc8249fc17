"""Every strategy with a model that Transformers has spread over two ranks by `tp_plan="auto"`."""

from __future__ import annotations

import families
import pytest
import torch
from ranks import run_ranks
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from hf_specdec.cache.selection import Selector
from hf_specdec.generation.methods.spd.method import SPDConfig
from hf_specdec.registry import presets


pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed"),
]

LAYERS = 2
PRESETS = [name for name in presets() if not name.startswith("spd")]


def build():
    """Return a model, the same in every process."""
    return families.build("Llama", seed=3, num_hidden_layers=LAYERS)


def on_one_rank(rank, folder):
    """Return what every preset gives with a share of the model's heads, and what Vegas selected."""
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float64)
    model.generation_config.pad_token_id = 0
    assistant, (ids, mask) = families.perturbed(build()), families.prompts()
    chosen, original = [], Selector.choose

    def choose(self, metric):
        found = original(self, metric)
        chosen.append(found.clone())
        return found

    Selector.choose = choose
    for stand_in in families.STAND_INS:
        setattr(*stand_in)
    texts = {}
    for name in PRESETS:
        for sample in (False, True):
            torch.manual_seed(0)  # as with stock generation, ranks must draw alike
            kwargs = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": sample}
            texts[name, sample] = families.generate(model, name, ids, assistant=assistant, **kwargs)
    try:
        model.generate(ids, assistant_strategy=SPDConfig(adapter="x"))
        refused = None
    except ValueError as error:
        refused = str(error)
    held = [p.to_local() if isinstance(p, DTensor) else p for p in model.model.layers.parameters()]
    return texts, chosen, refused, sum(p.numel() for p in held)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    build().save_pretrained(folder)
    return run_ranks(2, on_one_rank, folder)


@pytest.mark.parametrize("strategy", PRESETS)
def test_both_ranks_emit_the_text_of_the_whole_model(strategy, found):
    ids, mask = families.prompts()
    expected = build().generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    for texts, *_ in found:
        assert torch.equal(texts[strategy, False], expected)
    assert torch.equal(found[0][0][strategy, True], found[1][0][strategy, True])


def test_vegas_may_select_other_tokens_on_each_rank(found):
    """A rank reads its own heads' keys only, so its selection matters to no other; all see the same hidden states."""
    first, second = found[0][1], found[1][1]
    assert len(first) == len(second) > 0
    assert all(a.shape == b.shape for a, b in zip(first, second, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_layers_really_lie_on_two_ranks(found):
    whole = sum(p.numel() for p in build().model.layers.parameters())
    assert all(count < 0.6 * whole for *_, count in found)


def test_spd_refuses_a_model_that_is_spread_already(found):
    for *_, refused, _ in found:
        assert "tensor-parallel" in refused
