"""SpecBound's exit heads: what each kind computes, their files, and blocks over more than one call."""

from __future__ import annotations

import copy
import json

import families
import pytest
import torch
from families import NAMES, build
from safetensors.torch import load_file, save_file
from specbound_cases import (
    LAYERS,
    bounded,
    hidden_after,
    ours,
    questions,
    random_heads,
    refused,
    same_as_token_by_token,
    tower,
    truth,
)
from tiers import tiered

import hf_specdec
from hf_specdec import SpecBoundConfig, SpeculationConfig
from hf_specdec.configuration import ADAPTER_NAME, CONFIG_NAME
from hf_specdec.generation.methods.specbound.exit_heads import ExitHeads, load_exit_heads
from hf_specdec.generation.models.surgery import place_layer


@pytest.mark.parametrize("name", tiered(NAMES))
def test_the_models_own_head_on_the_last_states_gives_its_logits(name):
    """The final norm once, the head, soft-caps and scales: all that the model does after its layers."""
    case = tower(name)
    hidden, logits = hidden_after(name, LAYERS)
    with torch.no_grad():
        for kind, vocabulary in (("final", None), ("final", torch.arange(3, 40)), ("adapter", None), ("full", None)):
            heads = ExitHeads(case.model, [2, LAYERS - 1], kind, vocabulary)  # fresh ones change nothing
            found = heads.read(LAYERS - 1, hidden)
            expected = logits if vocabulary is None else logits[..., vocabulary]
            torch.testing.assert_close(found, expected, rtol=0, atol=10 * case.tolerance)
    assert not torch.allclose(heads.read(2, hidden_after(name, 2)[0]), logits, atol=1e-2)


def test_a_soft_cap_of_the_logits_reaches_the_heads():
    model = build("Gemma2", num_hidden_layers=2, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0)
    with torch.no_grad():
        logits = ExitHeads(model.float(), [1], "final").read(1, 50 * torch.randn(1, 3, 32))
    assert 1.5 < logits.abs().max() <= 2.0


def test_what_each_kind_of_head_computes(llama):
    model = llama.model
    hidden = hidden_after("llama", 3)[0]
    norm, weight = model.model.norm, model.lm_head.weight
    words = torch.tensor([4, 9, 10, 33])
    with torch.no_grad():
        for chosen in (None, words):
            rows = weight if chosen is None else weight[chosen]
            heads = random_heads(model, [2, 3], "adapter", chosen)
            expected = (norm(hidden) + norm(hidden) @ heads.own["3"].weight.T) @ rows.T
            torch.testing.assert_close(heads.read(3, hidden), expected)
            heads = random_heads(model, [2, 3], "adapter", chosen, rank=4)
            down, up = heads.own["3"]
            assert down.weight.shape == (4, 32) and up.weight.shape == (32, 4)
            expected = (norm(hidden) + norm(hidden) @ down.weight.T @ up.weight.T) @ rows.T
            torch.testing.assert_close(heads.read(3, hidden), expected)
            heads = random_heads(model, [2, 3], "full", chosen)
            torch.testing.assert_close(heads.read(3, hidden), norm(hidden) @ heads.own["3"].weight.T)
            assert heads.read(3, hidden).shape[-1] == len(rows)
    heads = ExitHeads(model, [2], "final", words)
    assert heads.tokens(torch.tensor([0, 3])).tolist() == [4, 33]
    scattered = heads.scatter(torch.ones(1, 4))
    assert scattered.shape == (1, families.VOCAB)
    assert torch.softmax(scattered, dim=-1)[0, words].tolist() == [0.25] * 4


def test_heads_hold_nothing_of_the_model_that_could_be_trained(llama):
    theirs = {id(value) for value in llama.model.parameters()}
    for kind, count in (("final", 0), ("adapter", 2), ("full", 2)):
        heads = ExitHeads(llama.model, [2, 3], kind)
        assert len(list(heads.parameters())) == count
        assert not theirs & {id(value) for value in heads.parameters()}
    assert not theirs & {id(value) for value in ExitHeads(llama.model, [2, 3], "block").parameters()}


@pytest.mark.parametrize(
    "kind, vocabulary, rank",
    [
        ("final", None, None), ("final", [3, 5, 60], None), ("adapter", None, None), ("adapter", [3, 5, 60], 4),
        ("full", None, None), ("full", [3, 5, 60], None), ("block", None, None), ("block", [3, 5, 60], None),
    ],
)  # fmt: skip
def test_heads_come_back_from_their_folder(llama, kind, vocabulary, rank, tmp_path):
    words = None if vocabulary is None else torch.tensor(vocabulary)
    heads = random_heads(llama.model, [2, 4], kind, words, rank)
    heads.save(tmp_path, bounded(alpha=0.25, exit_layers=[4]), llama.model, steps=7)
    back = load_exit_heads(llama.model, str(tmp_path))
    assert (back.layers, back.kind, back.rank) == ([2, 4], kind, rank)
    assert back.record["steps"] == 7
    assert not back.training and not any(value.requires_grad for value in back.parameters())
    saved, found = dict(heads.own.named_parameters()), dict(back.own.named_parameters())
    assert saved.keys() == found.keys()
    for key, value in saved.items():
        assert torch.equal(found[key], value.bfloat16().double()), key
    assert back.tokens(torch.arange(3)).tolist() == heads.tokens(torch.arange(3)).tolist()
    with torch.no_grad():
        for value in heads.own.parameters():
            value.copy_(value.bfloat16())
        hidden = hidden_after("llama", 4)[0]
        assert torch.equal(back.read(4, hidden), heads.read(4, hidden))
    # read once per model, until it is forgotten or the file changes
    assert load_exit_heads(llama.model, str(tmp_path)) is back
    hf_specdec.unload(llama.model)
    assert load_exit_heads(llama.model, str(tmp_path)) is not back
    # the folder alone is a strategy
    config = SpeculationConfig.from_pretrained(tmp_path)
    assert config == bounded(alpha=0.25, exit_layers=[4], adapter=str(tmp_path))
    out = ours(llama, str(tmp_path), max_new_tokens=12)
    assert torch.equal(out.sequences, truth()[:, : llama.ids.shape[1] + 12])
    assert list(out.speculation.method["exits"]) == ["4"]


def test_heads_of_another_model_are_refused(llama, tmp_path):
    random_heads(llama.model, [2, 3], "adapter").save(tmp_path, SpecBoundConfig(), llama.model)
    other = copy.deepcopy(llama.model)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.3)
    for model in (other, tower(layers=6).model, tower("qwen2", 6).model):
        refused(model, SpecBoundConfig(adapter=str(tmp_path)), names=["made for"])


def edited(folder, record=None, tensors=None):
    """Change a saved adapter's record and tensors by functions of them."""
    path = folder / CONFIG_NAME
    values = json.loads(path.read_text())
    if record is not None:
        record(values["adapter"])
    path.write_text(json.dumps(values))
    if tensors is not None:
        found = load_file(folder / ADAPTER_NAME)
        tensors(found)
        save_file(found, folder / ADAPTER_NAME, {"format": "pt"})


@pytest.mark.parametrize(
    "record, tensors",
    [
        *((lambda r, key=key: r.pop(key), None) for key in ("head", "layers", "rank", "model", "kind")),
        (lambda r: r.update(kind="draft"), None),
        (lambda r: r.update(head="unheard"), None),
        (lambda r: r.update(head="full"), None),
        (lambda r: r.update(layers=[2, 4]), None),
        (lambda r: r.update(layers=[2]), None),
        (lambda r: r.update(layers=[3, 2]), None),
        (lambda r: r.update(layers=[2, 99]), None),
        (lambda r: r.update(rank=4), None),
        (lambda r: r.update(format_version=99), None),
        (None, lambda t: t.clear()),
        (None, lambda t: t.update(more=torch.ones(2))),
        (None, lambda t: t.update({key: value[:-1] for key, value in t.items()})),
        (None, lambda t: t.update({key: value.flatten() for key, value in t.items()})),
        (None, lambda t: t.update(vocabulary=torch.tensor([3, 2, 1]))),
        (None, lambda t: t.update(vocabulary=torch.tensor([3, families.VOCAB]))),
    ],
)
def test_a_damaged_adapter_is_refused(llama, record, tensors, tmp_path):
    random_heads(llama.model, [2, 3], "adapter").save(tmp_path, SpecBoundConfig(), llama.model)
    edited(tmp_path, record, tensors)
    refused(llama.model, SpecBoundConfig(adapter=str(tmp_path)))


def test_bad_heads_are_refused(llama):
    for layers in ([], [0, 2], [3, 2], [2, 2], [2, LAYERS + 1]):
        with pytest.raises(ValueError, match="layers"):
            ExitHeads(llama.model, layers, "adapter")
    with pytest.raises(ValueError, match="kind"):
        ExitHeads(llama.model, [2], "linear")
    for kind, rank in (("full", 4), ("adapter", 0), ("adapter", 33)):
        with pytest.raises(ValueError, match="rank"):
            ExitHeads(llama.model, [2], kind, rank=rank)
    for words in ([], [3, 2], [-1, 2], [2, families.VOCAB]):
        with pytest.raises(ValueError, match="vocabulary"):
            ExitHeads(llama.model, [2], "adapter", torch.tensor(words))


@pytest.mark.parametrize("kwargs", [{}, {"lag": True}, {"chunk": 5}, {"turn": 2}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_blocks_read_what_a_forward_over_the_whole_text_gives(name, kwargs, adapter):
    """Over rejections: a block's own keys and values are those of the text that this call ran, and nothing else."""
    case = tower(name, 6)
    folder = adapter(case.model, "block", (1, 2, 4))
    config = bounded(name, max_depth=4, alpha=0, lag=kwargs.get("lag", False), adapter=folder)
    text, past, first = case.ids[:1], None, 0
    if "turn" in kwargs:
        before = case.stock(text, max_new_tokens=3, return_dict_in_generate=True)
        past, first = before.past_key_values, before.sequences.shape[1] - 1
        text = torch.cat([before.sequences, families.prompts((6,), seed=7)[0]], dim=1)
    options = {"attention_mask": torch.ones_like(text), "prefill_chunk_size": kwargs.get("chunk")}
    with questions() as asked:
        out = ours(case, config, input_ids=text, past_key_values=past, max_new_tokens=24, **options)
    assert 0 < out.speculation.num_accepted_tokens < out.speculation.num_draft_tokens
    assert len({question.layer for question in asked}) == 3
    heads, model = load_exit_heads(case.model, folder), copy.deepcopy(case.model)
    alone = {layer: of_one_layer(case.model, heads, layer) for layer in heads.layers}
    guesses = {}
    for text, pending, layer, _, logits in asked:
        with torch.no_grad():
            states = model.model(text, output_hidden_states=True).hidden_states
            # the head's true input before each token up to the pending one; for the drafts what they were guessed from
            before = torch.nn.functional.pad(states[-1][:, first:-1], (0, 0, 1, 0))
            for place in range(pending + 1, text.shape[1]):
                before[:, place - first] = guesses[tuple(text[0, :place].tolist())]
            own = heads.own[str(layer)]
            hidden = own.fuse(torch.cat([states[layer][:, first:], before], dim=-1))
            places = torch.arange(first, text.shape[1])[None]
            found = alone[layer](inputs_embeds=hidden, position_ids=places, output_hidden_states=True)
        guesses[tuple(text[0].tolist())] = found.hidden_states[-1][:, -1]
        torch.testing.assert_close(logits, found.logits[:, -1].float(), rtol=0, atol=1e-5)


def of_one_layer(model, heads, layer):
    """Return a stock model whose only layer and norm are those of a block."""
    alone = copy.deepcopy(model)
    config = alone.config
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-1:]
    block = copy.deepcopy(heads.own[str(layer)].layer)
    place_layer(block, 0)
    alone.model.layers = torch.nn.ModuleList([block])
    alone.model.norm = copy.deepcopy(heads.own[str(layer)].norm)
    for module in alone.modules():
        if hasattr(module, "config"):
            module.config = config
    return alone


@pytest.mark.parametrize("words", [None, 6])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_block_heads_over_a_second_turn(name, words, adapter):
    """Their own keys and values begin with the turn; the model's are those of the whole text."""
    case = tower(name, 6)
    config = bounded(name, max_depth=4, alpha=0.0, adapter=adapter(case.model, "block", (2, 4), words))
    first = {"max_new_tokens": 11, "return_dict_in_generate": True, "do_sample": False}
    expected, out = case.stock(**case.one, **first), ours(case, config, **first)
    assert torch.equal(out.sequences, expected.sequences)
    for said in (families.prompts((5,), seed=7)[0], torch.zeros(1, 0, dtype=torch.int64)):
        text = torch.cat([expected.sequences, said], dim=1)
        kwargs = {**first, "attention_mask": torch.ones_like(text), "max_new_tokens": 20}
        expected = case.stock(text, past_key_values=expected.past_key_values, **kwargs)
        out = ours(case, config, input_ids=text, past_key_values=out.past_key_values, **kwargs)
        assert torch.equal(out.sequences, expected.sequences)
        assert out.speculation.num_draft_tokens
    same_as_token_by_token(case, out)


def test_block_heads_carry_no_hooks_of_the_layer_that_they_were_copied_from(llama, tmp_path):
    calls = []
    handle = llama.model.model.layers[-1].register_forward_hook(lambda *_: calls.append(1))
    try:
        ExitHeads(llama.model, [2, 3], "block").save(tmp_path, SpecBoundConfig(), llama.model)
        ours(llama, bounded(adapter=str(tmp_path)), max_new_tokens=2)
    finally:
        handle.remove()
    calls.clear()
    ours(llama, bounded(adapter=str(tmp_path)), max_new_tokens=6)
    assert not calls
