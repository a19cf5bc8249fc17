"""A strategy whose rows can't share a step: the loop takes the rows of a batch in turn, inside one call."""

from __future__ import annotations

import pytest
import torch
from families import tiny_llama

from hf_specdec import VegasConfig
from hf_specdec.generation.methods.vegas import VegasStrategy


CONFIG = VegasConfig(min_context=0, min_tokens=2, kv_ratio=0.3, num_assistant_tokens=3)


@pytest.fixture
def in_turn(monkeypatch):
    monkeypatch.setattr(VegasStrategy, "batched", False)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(intermediate_size=48, pad_token_id=0, eos_token_id=1, bos_token_id=2)


@pytest.fixture(scope="module")
def inputs():
    ids = torch.randint(3, 40, (3, 14), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 5, 9)):
        mask[row, :pads] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("eos", [1, 17])
def test_text_scores_and_cache_equal_stocks(in_turn, model, inputs, eos):
    options = {**inputs, "max_new_tokens": 25, "do_sample": False, "eos_token_id": eos, "repetition_penalty": 1.1}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    stock = model.generate(**options)
    before = model.config._attn_implementation
    ours = model.generate(**options, assistant_strategy=CONFIG)
    assert torch.equal(ours.sequences, stock.sequences)
    for mine, theirs in zip(ours.scores, stock.scores, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)
    for mine, theirs in zip(ours.past_key_values.layers, stock.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-10, rtol=0)
    assert len(ours.speculation.accept_lengths) == 3
    assert model.config._attn_implementation == before

    more = torch.randint(3, 40, (3, 4), generator=torch.Generator().manual_seed(4))
    mask = torch.cat(
        [inputs["attention_mask"], torch.ones(3, stock.sequences.shape[1] - 14 + 4, dtype=torch.long)], dim=1
    )
    second = {"input_ids": torch.cat([stock.sequences, more], dim=1), "attention_mask": mask, "max_new_tokens": 8}
    wanted = model.generate(**second, do_sample=False, past_key_values=stock.past_key_values)
    found = model.generate(**second, do_sample=False, past_key_values=ours.past_key_values, assistant_strategy=CONFIG)
    assert torch.equal(found, wanted)


class Sink:
    def put(self, value):
        pass

    def end(self):
        pass


@pytest.mark.parametrize("extra", [{"streamer": Sink()}, {"max_time": 5.0}], ids=["streamer", "max_time"])
def test_what_sees_all_rows_by_column_is_refused(in_turn, model, inputs, extra):
    with pytest.raises(ValueError, match="in turn"):
        model.generate(**inputs, **extra, max_new_tokens=4, assistant_strategy=CONFIG)
