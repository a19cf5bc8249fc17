"""DIVERSED's head: what it computes, its files and the import of the reference's."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import families
import pytest
import torch
from diversed_cases import generate, pair, prompt, random_head, settings
from safetensors.torch import load_file, save_file

from hf_specdec import AssistedConfig, DiversedConfig, DiversedHead, SpeculationConfig, VegasConfig
from hf_specdec.configuration import ADAPTER_NAME, CONFIG_NAME
from hf_specdec.generation.methods.diversed.head import import_reference_head, load_head


def test_an_untrained_head_gives_one_weight_everywhere():
    for weight in (0.5, 0.8):
        found = DiversedHead(4, 6, init_weight=weight)(torch.randn(7, 4), torch.randn(7, 6))
        torch.testing.assert_close(found, torch.full((7,), weight))
    for bad in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="init_weight"):
            DiversedHead(4, 6, init_weight=bad)
    with pytest.raises(ValueError, match="input_norm"):
        DiversedHead(4, 6, input_norm="layer")


def test_rms_norm_scales_each_model_apart(tmp_path):
    head = random_head(pair(3))
    head.input_norm = "rms"
    torch.manual_seed(0)
    draft, target = 30 * torch.randn(5, 24), 0.01 * torch.randn(5, 16)
    parts = [state / state.square().mean(-1, keepdim=True).sqrt() for state in (draft, target)]
    torch.testing.assert_close(head(draft, target), torch.sigmoid((torch.cat(parts, -1) @ head.weight.T)[:, 0]))
    head.save(tmp_path, DiversedConfig(), pair(3)[1], pair(3)[0])
    loaded = load_head(*pair(3), str(tmp_path))
    assert torch.equal(loaded(draft, target), head(draft, target))


# files


def test_t_io_round_trip_is_exact(heads):
    head, folder = random_head(pair(3)), heads(pair(3))
    loaded = load_head(*pair(3), folder)
    assert torch.equal(loaded.weight, head.weight) and torch.equal(loaded.bias, head.bias)
    tensors = load_file(f"{folder}/{ADAPTER_NAME}")
    assert {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()} == {
        "weight": ((1, 40), torch.float32), "bias": ((1,), torch.float32),
    }  # fmt: skip
    assert loaded.record["input_order"] == ["draft", "target"] and loaded.record["weight_semantics"] == "target"


def test_t_io_a_folder_is_a_strategy(tmp_path):
    """`assistant_strategy=folder` uses the settings that the head was saved with."""
    config = settings(3, bonus="mixture", weight=None)
    random_head(pair(5)).save(tmp_path, config, pair(5)[1], pair(5)[0])
    read = SpeculationConfig.from_pretrained(tmp_path)
    assert read == config.override(adapter=str(tmp_path))
    texts = []
    for strategy in (str(tmp_path), config.override(adapter=str(tmp_path)), config.override(weight=0.5)):
        torch.manual_seed(0)
        texts.append(generate(pair(5), prompt(5), strategy, max_new_tokens=30))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def edited(folder, to, record=None, tensors=None):
    """Copy an adapter with changes."""
    values = json.loads(Path(folder, CONFIG_NAME).read_text())
    values["adapter"].update(record or {})
    to.mkdir(exist_ok=True)
    (to / CONFIG_NAME).write_text(json.dumps(values))
    save_file(tensors or load_file(f"{folder}/{ADAPTER_NAME}"), to / ADAPTER_NAME)
    return str(to)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"format_version": 2}, "format version 2"),
        ({"format_version": None}, "format version"),
        ({"kind": "draft"}, "kind 'draft'"),
        ({"head_type": "mlp"}, "head_type 'mlp'"),
        ({"input_order": ["target", "draft"]}, "input_order"),
        ({"weight_semantics": "draft"}, "weight_semantics 'draft'"),
        ({"activation": "softmax"}, "activation"),
        ({"hidden_source": "hidden_states"}, "hidden_source"),
        ({"draft_hidden_size": 16, "target_hidden_size": 24}, "size 24 from the `model`"),
        ({"draft_hidden_size": 32}, r"does not hold the tensors.*\(32, 16\)"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_t_io_heads_that_do_not_fit(heads, tmp_path, record, message):
    folder = edited(heads(pair(3)), tmp_path / "head", record)
    with pytest.raises(ValueError, match=message):
        generate(pair(3), prompt(3), settings(adapter=folder), max_new_tokens=4)


@pytest.mark.parametrize("tensors", [{"weight": torch.zeros(1, 41)}, {"weight": torch.zeros(2, 40)}, {"other": 0}])
def test_t_io_tensors_that_do_not_fit(heads, tmp_path, tensors):
    tensors = {"weight": torch.zeros(1, 40), "bias": torch.zeros(1)} | {
        name: torch.as_tensor(value) for name, value in tensors.items()
    }
    folder = edited(heads(pair(3)), tmp_path / "head", tensors=tensors)
    with pytest.raises(ValueError, match=r"does not hold the tensors.*\(24, 16\)"):
        load_head(*pair(3), folder)


def test_t_io_models_that_do_not_fit(heads):
    target, draft = pair(3)
    folder = heads((target, draft))
    with pytest.raises(ValueError, match="size 16 from the `model`"):
        load_head(draft, target, folder)
    wide = families.build("Llama", vocab_size=3, hidden_size=32)
    with pytest.raises(ValueError, match="size 24 from the `assistant_model`; this one's have 32"):
        load_head(target, wide, folder)
    other = families.build("Llama", seed=99, vocab_size=3, hidden_size=24)
    with pytest.raises(ValueError, match="another `assistant_model`"):
        load_head(target, other, folder)
    other = families.build("Llama", seed=99, vocab_size=3, hidden_size=16)
    with pytest.raises(ValueError, match="another `model`"):
        load_head(other, draft, folder)


def test_t_io_a_swapped_pair_of_one_width(heads):
    target, draft = (families.build("Llama", seed=seed, vocab_size=3, hidden_size=16) for seed in (1, 2))
    folder = heads((target, draft))
    load_head(target, draft, folder)
    with pytest.raises(ValueError, match="another `model`"):
        load_head(draft, target, folder)


def test_t_io_a_pair_with_another_vocabulary(heads):
    folder = heads(pair(3))
    wider = families.build("Llama", seed=7, vocab_size=4, hidden_size=16)
    with pytest.raises(ValueError, match="vocab_size"):
        load_head(wider, pair(3)[1], folder)


def test_t_io_folders_without_a_head(tmp_path, heads):
    with pytest.raises((FileNotFoundError, ValueError), match="nowhere"):
        generate(pair(3), prompt(3), settings(adapter=str(tmp_path / "nowhere")), max_new_tokens=4)
    with pytest.raises(FileNotFoundError, match=CONFIG_NAME):
        load_head(*pair(3), str(tmp_path))
    folder = edited(heads(pair(3)), tmp_path / "head")
    (tmp_path / "head" / ADAPTER_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=ADAPTER_NAME):
        load_head(*pair(3), folder)


def reference_file(folder, weight, bias, beside=None):
    path = folder / "ensemble_head.bin"
    torch.save({"summary.weight": weight, "summary.bias": bias}, path)
    if beside:
        (folder / "config.json").write_text(json.dumps(beside))
    return path


@pytest.mark.parametrize("beside", [None, {"draft_hidden_size": 4, "target_hidden_size": 6}])
def test_t_io_import_of_the_reference_format(tmp_path, beside):
    """Two outputs under a softmax, the draft's weight first; `w` is the second."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(10, 2).bfloat16()
    path = reference_file(tmp_path, layer.weight.detach(), layer.bias.detach(), beside)
    head = import_reference_head(path, None if beside else 4)
    draft, target = torch.randn(20, 4), torch.randn(20, 6)
    both = torch.softmax(layer.float()(torch.cat([draft, target], dim=1)), dim=-1)
    torch.testing.assert_close(head(draft, target), both[:, 1])
    assert (head(draft, target) - both[:, 0]).abs().max() > 0.1
    assert head.weight.dtype == torch.float32 and head.weight.shape == (1, 10)
    assert head.record["train"]["mix_space"] == "logit"


def test_t_io_import_of_known_weights(tmp_path):
    weight = torch.zeros(2, 10)
    weight[1, 0], weight[0, 9] = 1.0, 2.0
    head = import_reference_head(reference_file(tmp_path, weight, torch.tensor([0.5, 0.25])), 4)
    assert head.weight[0].tolist() == [1.0, *[0.0] * 8, -2.0] and head.bias.tolist() == [-0.25]


def test_t_io_an_imported_head_can_be_saved_and_used(tmp_path):
    torch.manual_seed(0)
    path = reference_file(tmp_path, torch.randn(2, 40).bfloat16(), torch.randn(2).bfloat16())
    head = import_reference_head(path, 24)
    head.save(tmp_path / "head", settings(), pair(5)[1], pair(5)[0])
    assert torch.equal(load_head(*pair(5), str(tmp_path / "head")).weight, head.weight)
    assert load_head(*pair(5), str(tmp_path / "head")).record["train"]["mix_space"] == "logit"
    generate(pair(5), prompt(5), str(tmp_path / "head"), max_new_tokens=5)


class Evil:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize(
    "content", [Evil(), {"summary.weight": Evil(), "summary.bias": torch.zeros(2)}], ids=["o", "d"]
)
def test_t_io_import_refuses_other_pickles(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "head.bin")
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        import_reference_head(tmp_path / "head.bin", 4)
    (tmp_path / "head.bin").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        import_reference_head(tmp_path / "head.bin", 4)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(2, 10)],
        {"summary.weight": torch.zeros(2, 10)},
        {"summary.weight": torch.zeros(1, 10), "summary.bias": torch.zeros(1)},
        {"summary.weight": torch.zeros(10, 2), "summary.bias": torch.zeros(2)},
        {"summary.weight": torch.zeros(2, 10), "summary.bias": torch.zeros(2), "more": torch.zeros(1)},
        {"summary.weight": torch.zeros(2, 10), "summary.bias": "zero"},
    ],
    ids=range(6),
)
def test_t_io_import_refuses_other_tensors(tmp_path, content):
    torch.save(content, tmp_path / "head.bin")
    with pytest.raises(ValueError, match="summary.weight"):
        import_reference_head(tmp_path / "head.bin", 4)


@pytest.mark.parametrize("size", [None, 0, 10, 11])
def test_t_io_import_needs_the_split(tmp_path, size):
    path = reference_file(tmp_path, torch.zeros(2, 10), torch.zeros(2))
    with pytest.raises(ValueError, match="draft_size"):
        import_reference_head(path, size)


@pytest.mark.parametrize(
    "config",
    [
        settings(4, weight=0.3, bonus="mixture", w_min=0.2, mix_space="logit", greedy_temperature=2.0),
        settings(adapter="somewhere", weight_offset=-1.5, restrict_to_target_support=True),
        settings(drafter=AssistedConfig(adapter="draft")),
        settings(drafter=VegasConfig(kv_ratio=0.2)),
    ],
    ids=range(4),
)
def test_t_io_settings_round_trip(config):
    assert SpeculationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_head_trained_under_other_warpers_is_announced(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_specdec.generation.methods.diversed.method.logger.warning_once", said.append)
    train = {"temperature": 0.7, "top_k": 0, "top_p": 1.0}
    random_head(pair(5)).save(tmp_path, settings(), pair(5)[1], pair(5)[0], train)
    generate(pair(5), prompt(5), str(tmp_path), max_new_tokens=4, temperature=0.7)
    assert not said
    generate(pair(5), prompt(5), str(tmp_path), max_new_tokens=4, temperature=1.0)
    assert len(said) == 1 and "temperature=0.7" in said[0]
