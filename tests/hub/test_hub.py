"""The Hub, in processes of their own: the client reads its address and whether it is offline when it is imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from families import ROOT, build
from transformers import AutoModelForCausalLM

import hf_specdec
from hf_specdec import AssistedConfig, SpecBoundConfig, SpeculationConfig, VegasConfig, ViaSDConfig
from hf_specdec.card import BEGIN, END, write_card
from hf_specdec.configuration import load_config
from hf_specdec.generation.methods.specbound.exit_heads import ExitHeads


def run(home, marker, offline):
    """Run the cases of `hub_cases.py` that a marker selects, against a Hub on localhost; return what they print."""
    names = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_XET_CACHE"}
    settings = {name: value for name, value in os.environ.items() if name not in names}
    settings |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1"}
    settings |= {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    arguments = [
        str(ROOT / "tests" / "hub_server.py"),
        str(ROOT / "tests" / "hub" / "hub_cases.py"),
        "-q",
        "-k",
        marker,
    ]
    arguments += ["-p", "no:cacheprovider", "--basetemp", str(home / marker)]
    return subprocess.run([sys.executable, *arguments], env=settings, capture_output=True, text=True, cwd=ROOT)


def passed(found):
    print(found.stdout[-8000:], found.stderr[-2000:])
    assert found.returncode == 0, "see the output"
    assert " passed" in found.stdout and "skipped" not in found.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(home):
    return run(home, "TestOnline", offline=False)


@pytest.mark.full
def test_push_and_pull_and_what_goes_wrong(online):
    passed(online)


@pytest.mark.full
def test_without_a_connection_the_cache_is_used(home, online):
    passed(run(home, "TestOffline", offline=True))


# a strategy saved with a model

PROMPT = torch.arange(3, 20)[None]


def heads(folder, model):
    """Save exit heads for a model, with settings that use them."""
    made = ExitHeads(model, [1, 2], "adapter")
    with torch.no_grad():
        for value in made.own.parameters():
            value.normal_(0, 0.1)
    made.save(folder, SpecBoundConfig(4, exit_layers=[2], max_depth=3, tau=0.01), model)
    return folder


@pytest.mark.parametrize("kind", ["folder", "settings", "config", "nested"])
def test_a_saved_strategy_needs_no_argument(kind, tmp_path, monkeypatch):
    """Also from another working directory, and with a generation config that came from the model's own."""
    model = build("Llama", seed=3, num_hidden_layers=4)
    model = type(model)(model.config).double().eval()
    assert model.generation_config._from_model_config
    monkeypatch.chdir(tmp_path)
    config, name = model.generation_config, "specbound"
    heads(tmp_path / "heads", model)
    if kind == "folder":
        config.assistant_strategy = "heads"
    elif kind == "settings":
        config.assistant_strategy = "specbound"
        config.assistant_strategy_config = {"adapter": "heads", "exit_layers": [2], "max_depth": 3, "tau": 0.01}
    elif kind == "config":
        config.assistant_strategy = SpeculationConfig.from_pretrained("heads")
    else:
        name = "via_sd"
        drafter = SpeculationConfig.from_pretrained("heads").override(num_assistant_tokens=3)
        settings = {"drafter": VegasConfig(3, min_context=0, min_tokens=2), "stage_stop_conf": 0.0}
        config.assistant_strategy, config.assistant_strategy_config = name, settings
        assert drafter.adapter == "heads"
    hf_specdec.save_strategy(model, tmp_path / "model")
    assert model.generation_config._from_model_config
    model.generation_config.assistant_strategy = model.generation_config.assistant_strategy_config = None
    expected = model.generate(PROMPT, max_new_tokens=12, do_sample=False)
    strategy = (tmp_path / "model" / "generation_config.json").read_bytes()
    model.save_pretrained(tmp_path / "model")  # writes a generation config without it
    (tmp_path / "model" / "generation_config.json").write_bytes(strategy)
    (tmp_path / "model").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "moved", dtype=torch.float64)
    out = loaded.generate(PROMPT, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    assert out.speculation.strategy == name and out.speculation.num_drafts > 0
    assert torch.equal(out.sequences, expected)


# cards


def test_a_card_that_is_there_is_completed_and_no_more(tmp_path):
    VegasConfig().save_pretrained(tmp_path)
    generated = (tmp_path / "README.md").read_text()
    assert "nothing was trained" in generated and "not measured" in generated and "Lossless" in generated
    text = "---\r\nlicense: mit # mine\r\ntags: [a]\r\n---\r\n\r\nWords.  \r\n"
    (tmp_path / "README.md").write_bytes(text.encode())
    VegasConfig(3).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == text.encode()
    for _ in range(2):
        write_card(tmp_path, load_config(tmp_path))
        found = (tmp_path / "README.md").read_bytes().decode()
        added = "library_name: hf_specdec\r\npipeline_tag: text-generation\r\n"
        assert found == text.replace("tags: [a]\r\n", f"tags: [a]\r\n{added}")
    (tmp_path / "README.md").write_text("Words.\n")
    write_card(tmp_path, load_config(tmp_path))
    assert (tmp_path / "README.md").read_text().endswith("- vegas\n---\n\nWords.\n")


@pytest.mark.parametrize(
    "text, message",
    [
        ("---\na: [\n---\n", "is not YAML"),
        ("---\n- a\n---\n", "keys and values, got list"),
        (f"{END} {BEGIN}", "once each"),
        (f"{BEGIN} {BEGIN} {END}", "once each"),
    ],
)
def test_cards_that_can_not_be_completed(tmp_path, text, message):
    VegasConfig().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)README.md.*{message}"):
        write_card(tmp_path, load_config(tmp_path))
    assert (tmp_path / "README.md").read_text() == text


def test_a_card_tells_what_was_learned_and_what_is_lossy(tmp_path):
    config = SpeculationConfig.from_pretrained(ROOT / "examples" / "adapters" / "draft")
    config.save_pretrained(tmp_path / "draft")
    (tmp_path / "draft" / "README.md").unlink()
    config = AssistedConfig(2, adapter=str(tmp_path / "draft"))
    config.save_pretrained(tmp_path / "copy")
    text = (tmp_path / "copy" / "README.md").read_text()
    for part in ("base_model: HuggingFaceTB/SmolLM2-135M-Instruct", "| steps_done | 2091 |", "| agreement | 0.5275 |"):
        assert part in text
    assert "gsm8k_dev.jsonl" in text and "assistant_model=" not in text and "SmolLM2-135M-Instruct only" in text
    ViaSDConfig(mode="lossy", drafter="prompt_lookup", force=True).save_pretrained(tmp_path / "lossy")
    assert "**Lossy**" in (tmp_path / "lossy" / "README.md").read_text()


def test_every_card_of_the_repository_is_complete(tmp_path):
    adapters = ROOT / "examples" / "adapters"
    cards = sorted(adapters.rglob("README.md"))
    assert len(cards) == 6
    for place, card in enumerate(cards):
        copy = tmp_path / str(place)
        copy.mkdir()
        for name in ("README.md", "specdec_config.json"):
            shutil.copy(card.parent / name, copy)
        write_card(copy, load_config(copy))
        assert (copy / "README.md").read_bytes() == card.read_bytes(), card
