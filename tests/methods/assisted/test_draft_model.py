"""Drafts cut from a target: what they share, what their files hold, how they draft in stock's loop and in ours."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import load_file

import hf_specdec
from hf_specdec import AssistedConfig, DiversedConfig, SpeculationConfig
from hf_specdec.configuration import ADAPTER_NAME, CONFIG_NAME
from hf_specdec.generation.models.draft_model import cut_draft, load_draft, own_parameters, save_draft
from hf_specdec.generation.models.surgery import decoder_layers
from hf_specdec.generation.models.vocabulary import ReducedHead


NAMES = ["llama", "gemma3", "gpt2", "gpt_neox", "gpt_oss"]
WORDS = torch.arange(3, families.VOCAB, 2)


@pytest.fixture
def target():
    """Return a target of four layers, whose weights bf16 holds exactly."""
    return rounded(families.build("Llama", seed=1, num_hidden_layers=4))


def rounded(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def trained(draft, target, seed=0):
    """Change what the draft has of its own, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in own_parameters(draft, target).values():
            value += 0.05 * value.std() * torch.randn_like(value) if value.numel() > 1 else 0.0
    return rounded(draft)


@pytest.fixture
def saved(target, tmp_path):
    """Return a draft of the layers 0 and 2 over half of the words, and the folder that it was saved in."""
    draft = trained(cut_draft(target, [0, 2], WORDS), target)
    save_draft(draft, target, [0, 2], tmp_path / "draft", AssistedConfig(num_assistant_tokens=3), {"note": "toy"})
    return draft, str(tmp_path / "draft")


def ids(batch=2, length=9):
    return torch.randint(3, families.VOCAB, (batch, length), generator=torch.Generator().manual_seed(4))


# cutting


@pytest.mark.parametrize("name", NAMES)
def test_a_draft_shares_embedding_and_head_and_copies_its_layers(name):
    target = families.family(name).model
    before = weights(target)
    draft = cut_draft(target, [1])
    assert type(draft) is type(target) and draft.config.num_hidden_layers == len(decoder_layers(draft)) == 1
    assert target.config.num_hidden_layers == len(decoder_layers(target)) == 2
    assert draft.get_input_embeddings() is target.get_input_embeddings()
    assert draft.get_output_embeddings() is target.get_output_embeddings()
    own, theirs = decoder_layers(draft)[0].state_dict(), decoder_layers(target)[1].state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
    with torch.no_grad():
        for value in own_parameters(draft, target).values():
            value.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_a_draft_of_all_layers_is_the_target(name):
    family = families.family(name)
    draft = cut_draft(family.model, [0, 1])
    with torch.no_grad():
        torch.testing.assert_close(draft(ids()).logits, family.model(ids()).logits, atol=0, rtol=0)


def test_a_draft_skips_the_layers_that_are_left_out(target):
    """Equal to the target with those layers made the identity; its layers count from 0 for their cache."""
    draft = cut_draft(target, [0, 2])
    assert [layer.self_attn.layer_idx for layer in decoder_layers(draft)] == [0, 1]
    assert [layer.self_attn.layer_idx for layer in decoder_layers(target)] == [0, 1, 2, 3]
    whole = decoder_layers(target)
    for index in (1, 3):
        whole[index].forward = lambda hidden_states, *args, **kwargs: hidden_states
    with torch.no_grad():
        torch.testing.assert_close(draft(ids()).logits, target(ids()).logits)
        del whole[1].forward, whole[3].forward
        assert (draft(ids()).logits - target(ids()).logits).abs().max() > 0.1


def test_kinds_of_layers_follow_the_cut():
    target = families.family("gemma3").model
    assert target.config.layer_types == ["sliding_attention", "full_attention"]
    assert cut_draft(target, [1]).config.layer_types == ["full_attention"]
    assert cut_draft(target, [0]).config.layer_types == ["sliding_attention"]
    assert target.config.layer_types == ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("layers", [[], [4], [-1], [0, 4], [2, 1], [1, 1], [-1, 0]], ids=str)
def test_wrong_layers(target, layers):
    with pytest.raises(ValueError, match="layers"):
        cut_draft(target, layers)


@pytest.mark.parametrize("words", [[], [5, 4], [5, 5], [-1, 3], [3, 64]], ids=str)
def test_wrong_vocabularies(target, words):
    with pytest.raises(ValueError, match="vocabulary"):
        cut_draft(target, [0], torch.tensor(words, dtype=torch.int64))


@pytest.mark.parametrize("bias", [False, True])
def test_a_reduced_head_scores_its_words_like_the_full_head(bias):
    torch.manual_seed(0)
    full = torch.nn.Linear(16, 64, bias=bias)
    head, hidden = ReducedHead(full, WORDS), torch.randn(2, 5, 16)
    with torch.no_grad():
        logits, distribution = head(hidden), torch.softmax(head(hidden), dim=-1)
        torch.testing.assert_close(logits[..., WORDS], full(hidden)[..., WORDS])
        torch.testing.assert_close(head.reduced(hidden), logits[..., WORDS])
    outside = torch.ones(64, dtype=torch.bool)
    outside[WORDS] = False
    assert logits.shape == (2, 5, 64) and logits.isfinite().all()
    assert distribution[..., outside].max() <= 1e-4 and (distribution[..., WORDS] > 0).all()
    torch.testing.assert_close(distribution[..., WORDS], torch.softmax(full(hidden)[..., WORDS], dim=-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_reduced_head_in_half_precision(dtype):
    torch.manual_seed(0)
    full = torch.nn.Linear(16, 64, bias=False).to(dtype)
    with torch.no_grad():
        logits = ReducedHead(full, WORDS)(torch.randn(3, 16).to(dtype))
    assert logits.dtype == dtype and logits.isfinite().all()
    assert torch.softmax(logits.float(), dim=-1)[:, 4].max() <= 1e-4


def test_a_draft_proposes_only_its_words(target):
    draft = cut_draft(target, [0, 1], WORDS)
    inside = torch.zeros(families.VOCAB, dtype=torch.bool)
    inside[WORDS] = True
    text = draft.generate(ids(4), do_sample=True, max_new_tokens=40, top_k=0)
    assert inside[text[:, 9:]].all()
    text = target.generate(ids(4), do_sample=True, max_new_tokens=40, top_k=0)
    assert not inside[text[:, 9:]].all()
    assert target.get_output_embeddings().weight.shape[0] == families.VOCAB


# files


def test_the_file_holds_layers_norm_and_vocabulary_only(saved):
    draft, folder = saved
    tensors = load_file(f"{folder}/{ADAPTER_NAME}")
    assert {name.split(".layers.")[0] if ".layers." in name else name for name in tensors} == {
        "model", "model.norm.weight", "vocabulary",
    }  # fmt: skip
    layers = sum(value.numel() for value in decoder_layers(draft).state_dict().values())
    assert sum(value.numel() for value in tensors.values()) == layers + 32 + len(WORDS)
    assert {value.dtype for name, value in tensors.items() if name != "vocabulary"} == {torch.bfloat16}
    assert tensors["vocabulary"].tolist() == WORDS.tolist()
    record = json.loads(Path(folder, CONFIG_NAME).read_text())["adapter"]
    assert record["kind"] == "draft" and record["layers"] == [0, 2] and record["note"] == "toy"
    assert SpeculationConfig.from_pretrained(folder) == AssistedConfig(num_assistant_tokens=3, adapter=folder)


def test_a_draft_without_a_vocabulary_of_its_own(target, tmp_path):
    draft = trained(cut_draft(target, [1, 3]), target)
    save_draft(draft, target, [1, 3], tmp_path, AssistedConfig())
    assert "vocabulary" not in load_file(tmp_path / ADAPTER_NAME)
    loaded = load_draft(target, str(tmp_path))
    assert loaded.get_output_embeddings() is target.get_output_embeddings()
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, draft(ids()).logits)


def test_a_loaded_draft_is_the_one_that_was_saved(saved, target):
    draft, folder = saved
    before = weights(target)
    loaded = load_draft(target, folder)
    assert loaded.state_dict().keys() == draft.state_dict().keys()
    assert all(torch.equal(value, draft.state_dict()[name]) for name, value in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, draft(ids()).logits)
        assert not torch.equal(loaded(ids()).logits, cut_draft(target, [0, 2], WORDS)(ids()).logits)
    assert loaded.get_input_embeddings() is target.get_input_embeddings()
    assert not loaded.training and not any(value.requires_grad for value in own_parameters(loaded, target).values())
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_loading_a_draft_leaves_the_target_trainable(saved, target):
    target.train()
    load_draft(target, saved[1])
    assert target.training and all(value.requires_grad for value in target.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_drafts_of_many_families_come_back(name, tmp_path):
    target = rounded(families.perturbed(families.family(name).model, 0.0))
    draft = trained(cut_draft(target, [1], WORDS), target)
    save_draft(draft, target, [1], tmp_path, AssistedConfig())
    with torch.no_grad():
        assert torch.equal(load_draft(target, str(tmp_path))(ids()).logits, draft(ids()).logits)


def test_another_target_is_refused(saved):
    _, folder = saved
    with pytest.raises(ValueError, match="another `model`"):
        load_draft(families.build("Llama", seed=2, num_hidden_layers=4), folder)
    for changes in ({"num_hidden_layers": 3}, {"hidden_size": 16, "head_dim": 4}, {"vocab_size": 80}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            load_draft(families.build("Llama", seed=1, **{"num_hidden_layers": 4, **changes}), folder)
    with pytest.raises(ValueError, match="model_type"):
        load_draft(families.build("Qwen2", seed=1, num_hidden_layers=4), folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_target_in_another_precision_is_taken(saved, target, dtype):
    assert load_draft(target.to(dtype), saved[1]).dtype == dtype


def test_a_file_whose_record_is_wrong(saved, target):
    _, folder = saved
    values = json.loads(Path(folder, CONFIG_NAME).read_text())
    for change, message in (
        ({"layers": [0, 1, 2]}, "layers"),
        ({"layers": [0, 9]}, "layers"),
        ({"kind": "diversed_head"}, "kind"),
        ({"format_version": 99}, "format version"),
    ):
        wrong = {**values, "adapter": {**values["adapter"], **change}}
        Path(folder, CONFIG_NAME).write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            load_draft(target, folder)


def test_places_without_a_draft(target, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_draft(target, str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=CONFIG_NAME):
        load_draft(target, str(tmp_path))
    AssistedConfig().save_pretrained(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError)):
        load_draft(target, str(tmp_path))


def test_a_draft_is_read_once_per_target_until_unloaded(saved, target):
    draft, folder = saved
    first = load_draft(target, folder)
    assert load_draft(target, folder) is first
    other = rounded(families.build("Llama", seed=1, num_hidden_layers=4))
    assert load_draft(other, folder) is not first
    save_draft(trained(draft, target, seed=1), target, [0, 2], folder, AssistedConfig(num_assistant_tokens=3))
    hf_specdec.unload(target)
    second = load_draft(target, folder)
    assert second is not first
    with torch.no_grad():
        assert torch.equal(second(ids()).logits, draft(ids()).logits)
        assert not torch.equal(second(ids()).logits, first(ids()).logits)


# drafting


def test_greedy_text_is_the_targets_in_every_loop(saved, target):
    _, folder = saved
    options = {"do_sample": False, "max_new_tokens": 30}
    plain = target.generate(ids(1), **options)
    draft = load_draft(target, folder)
    assert torch.equal(target.generate(ids(1), assistant_model=draft, **options), plain)
    assert torch.equal(target.generate(ids(1), assistant_model=draft, assistant_strategy="assisted", **options), plain)
    out = target.generate(ids(1), assistant_strategy=folder, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, plain)
    assert out.speculation.strategy == "assisted" and out.speculation.num_draft_tokens > 0
    assert max(map(max, out.speculation.accept_lengths)) <= 4  # three drafts, as saved
    assert torch.equal(target.generate(ids(1), **options), plain)


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_many_families(name, tmp_path):
    family = families.family(name)
    target = family.model
    save_draft(cut_draft(target, [0, 1], WORDS), target, [0, 1], tmp_path, AssistedConfig(num_assistant_tokens=3))
    options = {**family.batch, "do_sample": False, "max_new_tokens": 16}
    out = target.generate(assistant_strategy=str(tmp_path), return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, target.generate(**options))
    assert 0 < out.speculation.num_accepted_tokens < out.speculation.num_draft_tokens


def test_a_folder_needs_no_assistant_and_takes_no_second_one(saved, target):
    draft, folder = saved
    with pytest.raises(ValueError, match="assistant_model.*adapter"):
        target.generate(ids(1), assistant_strategy=folder, assistant_model=draft, max_new_tokens=4)
    with pytest.raises(ValueError, match="assistant_model"):
        target.generate(ids(1), assistant_strategy="assisted", max_new_tokens=4)


def test_a_folder_in_a_call_of_another_target(saved):
    with pytest.raises(ValueError, match="another `model`"):
        families.build("Llama", seed=2, num_hidden_layers=4).generate(
            ids(1), assistant_strategy=saved[1], max_new_tokens=4
        )


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_cut_draft_drafts_for_an_ensemble(saved, target, weight):
    draft, folder = saved
    config = DiversedConfig(weight=weight, bonus="mixture", drafter=AssistedConfig(adapter=folder))
    options = {"do_sample": False, "max_new_tokens": 20}
    text = target.generate(ids(2), assistant_strategy=config, **options)
    own = [model.generate(ids(2), **options) for model in (draft, target)]
    assert torch.equal(text, own[int(weight)]) and not torch.equal(*own)
