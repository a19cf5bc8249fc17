"""SPD's settings, its stages and features, and the files of its draft module: what is refused, and what survives."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from families import build
from safetensors.torch import load_file, save_file
from spd_cases import QUICK, SMALL, UNEVEN, Module, prompt, small, stock, target, texts

from hf_specdec import SPDConfig, SpeculationConfig, unload
from hf_specdec.generation.methods.spd.depth_map import DepthMap
from hf_specdec.generation.methods.spd.draft_module import KIND, load_draft_module
from hf_specdec.generation.models.adapters import remember
from hf_specdec.training.spd import ModuleTraining, train_draft_module


# settings


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schedule": "parallel"}, "`schedule` must be one of auto, serial, threads, dist.*'parallel'"),
        ({"timeout": 0}, "`timeout` must be above 0.*got 0"),
        ({"timeout": float("nan")}, "`timeout` must be above 0.*nan"),
        ({"timeout": float("inf")}, "`timeout` must be above 0 and finite.*inf"),
        ({"num_stages": 3}, "`num_stages` is 3.*8 layers.*allowed: 1, 2, 4, 8"),
        ({"num_stages": 0}, "`num_stages`.*0.*allowed: 1, 2, 4, 8"),
        ({"num_stages": -2}, "`num_stages`.*-2.*allowed: 1, 2, 4, 8"),
        ({"num_stages": 2}, "`num_stages` is 2.*trained with 4"),
        ({"stage_layers": [2, 2, 2]}, "`stage_layers` must be 3 counts.*sum to 8.*2, 2, 2"),
        ({"stage_layers": [0, 4, 2, 2]}, "`stage_layers` must be 4 counts of at least 1"),
        ({"stage_layers": [3, 1, 2, 2]}, "`stage_layers` is .3, 1, 2, 2.*trained with .2, 2, 2, 2"),
        ({"num_stages": 4, "stage_layers": [4, 4]}, "`stage_layers` must be 4 counts"),
        ({"adapter": None}, "`adapter`"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_before_any_forward(change, message):
    model, calls = target(), []
    remember(model, KIND, "module", Module(model, 4))
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ValueError, match=f"(?s){message}"):
            config = SPDConfig(**{"adapter": "module", **change})
            model.generate(prompt(4), assistant_strategy=config, max_new_tokens=4)
    finally:
        hook.remove()
    assert not calls


def test_the_number_of_drafts_is_not_for_the_caller():
    model = target()
    remember(model, KIND, "module", Module(model, 4))
    with pytest.raises(TypeError, match="num_assistant_tokens"):
        SPDConfig(adapter="module", num_assistant_tokens=2)
    with pytest.raises(ValueError, match="`num_assistant_tokens=4` has no effect.*'spd'"):
        model.generate(
            prompt(4), assistant_strategy=SPDConfig(adapter="module"), max_new_tokens=4, num_assistant_tokens=4
        )


def test_settings_that_say_what_the_adapter_says_are_taken():
    model = target()
    remember(model, KIND, "module", Module(model, 4, stage_layers=UNEVEN))
    config = SPDConfig(adapter="module", num_stages=4, stage_layers=UNEVEN)
    found = model.generate(prompt(4), assistant_strategy=config, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, stock(model, prompt(4), 6))
    assert SPDConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "arguments, bounds, features, types",
    [
        ((32, 4), [0, 8, 16, 24, 32], [0, 8, 16, 24, 31], [0, 1, 2, 3, 4]),
        ((32, 8), [*range(0, 33, 4)], [0, 8, 16, 24, 31], [0, 0, 1, 1, 2, 2, 3, 3, 4]),
        ((32, 16), [*range(0, 33, 2)], [0, 8, 16, 24, 31], [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4]),
        ((8, 4, UNEVEN), [0, 1, 4, 6, 8], [0, 1, 4, 6, 7], [0, 1, 2, 3, 4]),
        ((8, 4, UNEVEN, [0, 3, 5, 7]), [0, 1, 4, 6, 8], [0, 3, 5, 7], [0, 0, 1, 2, 3]),
        ((4, 4), [0, 1, 2, 3, 4], [0, 1, 2, 3], [0, 1, 2, 3, 3]),
        ((6, 1), [0, 6], [0, 5], [0, 1]),
    ],
    ids=str,
)
def test_stages_and_features(arguments, bounds, features, types):
    depths = DepthMap(*arguments)
    assert (depths.bounds, depths.features, depths.types) == (bounds, features, types)
    # a stage gives what lies in it, its own end included
    assert [depths.produced(s) for s in range(depths.stages)] == [
        [f for f in features if a < f <= b] for a, b in zip(bounds, bounds[1:], strict=False)
    ]


@pytest.mark.parametrize(
    "features", [[], [1, 2], [0, 4, 3], [0, 2, 2], [0, 4, 8], [0, 9], [0, 1, 2, 3], [0, -1]], ids=str
)
def test_features_out_of_place_are_refused(features):
    """Not ascending, not from 0, the last layer's output (normed in stock's list of states), or never the deepest."""
    with pytest.raises(ValueError, match="`feature_layers`"):
        DepthMap(8, 4, None, features)


# files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("module")
    model = copy.deepcopy(small())
    model.generation_config.eos_token_id = [1, 2]
    settings = ModuleTraining(**{**QUICK, "vocabulary_size": 20}, steps=3, stage_layers=(1, 1, 1, 1), max_length=18)
    train_draft_module(model, texts(), path, settings, notes={"data": "three texts"})
    return path


def test_a_module_survives_its_folder(folder, tmp_path):
    config = json.loads((folder / "specdec_config.json").read_text())
    tensors = load_file(folder / "specdec_adapter.safetensors")
    record, ids = config["adapter"], tensors["draft_token_ids"]
    assert config["strategy"] == "spd"
    wanted = {"num_stages": 4, "stage_layers": [1, 1, 1, 1], "feature_layers": [0, 1, 2, 3], "architecture": "v11"}
    assert wanted.items() <= record.items()
    assert (record["train_span"], record["train_layout"], record["data"]) == (18, "exact", "three texts")
    assert len(ids) == 20 and ids.tolist() == sorted({*ids.tolist()}) and {1, 2} <= {*ids.tolist()}
    # neither the embedding nor the norm nor the model's own head
    assert {name.split(".")[0] for name in tensors} == {"feature_proj", "layers", "lm_head", "draft_token_ids"}
    assert tensors["feature_proj.3.weight"].shape == (32, 4 * 32) and tensors["lm_head.weight"].shape == (20, 32)
    module = load_draft_module(small(), str(folder))
    assert module.span == 18 and not module.training
    assert type(SpeculationConfig.from_pretrained(folder)) is SPDConfig
    module.save(tmp_path, SPDConfig(), small())
    unload(small())
    again = load_draft_module(small(), str(tmp_path))
    assert again is not module and again.depths.bounds == module.depths.bounds
    for (name, a), (_, b) in zip(module.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    options = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True}
    ids = texts()[2].ids[None, :4]
    outs = [small().generate(ids, assistant_strategy=str(path), **options) for path in (folder, tmp_path)]
    assert torch.equal(outs[0].sequences, stock(small(), ids, 12))
    assert outs[0].speculation.accept_lengths == outs[1].speculation.accept_lengths
    assert outs[0].speculation.method["num_stages"] == 4


def test_a_module_follows_its_model_to_another_type(folder):
    model, ids = copy.deepcopy(small()), texts()[2].ids[None, :4]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model.to(dtype)
        options = {"do_sample": False, "max_new_tokens": 10}
        expected = model.generate(ids, assistant_strategy="plain", **options)
        assert torch.equal(model.generate(ids, assistant_strategy=str(folder), **options), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 4}, "another `model` of the same shape"),
        ({"num_hidden_layers": 8}, "num_hidden_layers 4.*8"),
        ({"vocab_size": 50}, "vocab_size 48.*50"),
        ({"prefix": "Qwen2"}, "model_type 'llama'.*'qwen2'"),
    ],
    ids=str,
)
def test_a_module_of_another_model_is_refused(folder, change, message):
    change = {"prefix": "Llama", "seed": 3, **change}
    model = build(change.pop("prefix"), seed=change.pop("seed"), **{**SMALL, **change}).float()
    with pytest.raises(ValueError, match=message):
        model.generate(prompt(4, vocab=40), assistant_strategy=str(folder), max_new_tokens=4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architecture": "v10"}, "architecture 'v10'.*v11"),
        ({"kind": "exit_heads"}, "kind 'exit_heads'.*'draft_module'"),
        ({"num_stages": 2}, "`stage_layers` must be 2 counts"),
        ({"stage_layers": [1, 2, 1]}, "`stage_layers` must be 4 counts"),
        ({"num_stages": 2, "stage_layers": [2, 2]}, "`feature_layers`"),
        ({"feature_layers": [0, 1, 3]}, "does not hold the tensors"),
        ({"templates": [9]}, "`templates` must be layers below 4"),
        ({"templates": [1, 2]}, "does not hold the tensors"),
        ({"stage_layers": None}, "record without stage_layers"),
        ({"draft_token_ids": "descending"}, "ascending"),
        ({"lm_head.weight": None}, "does not hold the tensors"),
    ],
    ids=str,
)
def test_a_record_that_does_not_fit_is_refused(folder, tmp_path, change, message):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(folder / "specdec_adapter.safetensors")
    config = json.loads((tmp_path / "specdec_config.json").read_text())
    for key, value in change.items():
        if key == "draft_token_ids":
            tensors[key] = tensors[key].flip(0).contiguous()
        elif key in tensors:
            del tensors[key]
        elif value is None:
            del config["adapter"][key]
        else:
            config["adapter"][key] = value
    (tmp_path / "specdec_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "specdec_adapter.safetensors")
    with pytest.raises(ValueError, match=message):
        small().generate(prompt(4, vocab=40), assistant_strategy=str(tmp_path), max_new_tokens=4)


def test_the_stages_of_an_adapter_are_its_own(folder):
    for change in ({"num_stages": 2}, {"stage_layers": [2, 1, 1]}):
        with pytest.raises(ValueError, match="trained with"):
            config = SPDConfig(adapter=str(folder), **change)
            small().generate(prompt(4, vocab=40), assistant_strategy=config, max_new_tokens=4)
