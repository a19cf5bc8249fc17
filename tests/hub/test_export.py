"""Exported `custom_generate` repositories under stock `generate()`: the same text, all arguments, no side effects."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.generation import BaseStreamer
from typer.testing import CliRunner

import hf_specdec
from hf_specdec import AssistedConfig, DiversedConfig, SpeculationConfig, SpeculationOutput, registry
from hf_specdec.commands.main import app
from hf_specdec.export import _requirement, export_custom_generate
from hf_specdec.generation.methods.plain import PlainStrategy
from hf_specdec.generation.methods.via_sd.slim_model import save_slim
from hf_specdec.generation.models.draft_model import cut_draft, save_draft


GREEDY = {"do_sample": False, "max_new_tokens": 12}
WITHOUT_ADAPTER = [
    name for name in registry.presets() if not registry.strategy_class(name.partition(":")[0]).needs_adapter
]


@pytest.fixture(autouse=True)
def modules(tmp_path_factory, monkeypatch):
    """Let Transformers copy the code that it runs to a place of the test's."""
    cache = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    monkeypatch.setattr(sys, "path", [*sys.path, cache])


@pytest.fixture
def uninstalled():
    hf_specdec.uninstall()
    yield
    hf_specdec.install()


@pytest.fixture
def vegas(tmp_path):
    """An exported strategy without an adapter."""
    export_custom_generate(families.configured("vegas"), tmp_path / "vegas")
    return str(tmp_path / "vegas")


class Streamer(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], 0

    def put(self, value):
        self.parts.append(value)

    def end(self):
        self.ended += 1


def from_folder(model, folder, **kwargs):
    kwargs = {**GREEDY, "return_dict_in_generate": True, **kwargs}
    return model.generate(**kwargs, custom_generate=str(folder), trust_remote_code=True)


# use


@pytest.mark.parametrize("strategy", WITHOUT_ADAPTER)
def test_text_and_statistics_are_those_of_the_keyword(strategy, llama, tmp_path):
    """A ragged batch, an EOS inside it, and the assistant where one is needed."""
    config = families.configured(strategy)
    if config.strategy == "via_sd":  # its mask has to lie in a folder
        save_slim(tmp_path / "mask", llama.model, [True, False, True, True], "sublayer")
        config = config.override(adapter=str(tmp_path / "mask"))
    export_custom_generate(config, tmp_path / "repo")
    options = {**llama.batch, "eos_token_id": llama.eos}
    asked = {**GREEDY, **options, "return_dict_in_generate": True}
    expected = llama.ours(strategy, **asked)
    stock = llama.stock(**{**asked, "return_dict_in_generate": False})
    hf_specdec.uninstall()
    try:
        extras = families.extras(strategy, llama.assistant)
        out = from_folder(llama.model, tmp_path / "repo", **options, **extras)
        ids = from_folder(llama.model, tmp_path / "repo", **options, **extras, return_dict_in_generate=False)
        assert not hasattr(GenerationMixin.generate, "_hf_specdec_original")
    finally:
        hf_specdec.install()
    assert isinstance(out, SpeculationOutput)
    assert torch.equal(out.sequences, stock)
    assert torch.equal(ids, stock)
    found, wanted = (stats and stats.to_dict() for stats in (out.speculation, expected.speculation))
    assert found == wanted and (found is not None or strategy == "plain")  # which speculates nothing


def test_a_streamer_gets_the_prompt_and_every_token_once(uninstalled, vegas, llama):
    streamer = Streamer()
    out = from_folder(llama.model, vegas, **llama.one, streamer=streamer)
    assert torch.equal(torch.cat([part.flatten() for part in streamer.parts]), out.sequences[0])
    assert len(streamer.parts) == 1 + GREEDY["max_new_tokens"]
    assert streamer.ended == 1


def test_stop_strings_stop_with_a_tokenizer(uninstalled, vegas, llama):
    tokenizer = families.tokenizer()
    text = llama.stock(**llama.one, max_new_tokens=12)[0, llama.ids.shape[1] :]
    options = {**llama.one, "stop_strings": [families.letter(int(text[5]))], "tokenizer": tokenizer}
    out = from_folder(llama.model, vegas, **options)
    assert torch.equal(out.sequences, llama.stock(**options, max_new_tokens=12))
    assert out.sequences.shape[1] < llama.ids.shape[1] + 12
    with pytest.raises(ValueError, match="tokenizer"):
        from_folder(llama.model, vegas, **{**options, "tokenizer": None})


def test_sampling_and_a_second_turn(uninstalled, vegas, llama):
    torch.manual_seed(3)
    first = from_folder(llama.model, vegas, **llama.one, do_sample=True, top_k=10)
    torch.manual_seed(3)
    again = from_folder(llama.model, vegas, **llama.one, do_sample=True, top_k=10)
    assert torch.equal(first.sequences, again.sequences)
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    longer = torch.cat([first.sequences, llama.ids[:1, :4]], dim=1)
    out = from_folder(llama.model, vegas, input_ids=longer, past_key_values=first.past_key_values)
    assert torch.equal(out.sequences, llama.stock(longer, max_new_tokens=12))


@pytest.mark.parametrize("installed", [True, False])
def test_settings_of_one_call(installed, vegas, llama, request):
    """The wrapper, where it is, lets them pass to the repository; keywords of the Hub are the loader's."""
    if not installed:
        request.getfixturevalue("uninstalled")
    usual = from_folder(llama.model, vegas, **llama.one, revision="main", local_files_only=True, token=False)
    by_name = from_folder(llama.model, vegas, **llama.one, num_assistant_tokens=1)
    by_dict = from_folder(llama.model, vegas, **llama.one, assistant_strategy_config={"num_assistant_tokens": 1})
    assert len(usual.speculation.num_accepted_tokens_per_pos) == 3
    for out in (by_name, by_dict):
        assert len(out.speculation.num_accepted_tokens_per_pos) == 1
    with pytest.raises((ValueError, TypeError), match="no_such_field"):
        from_folder(llama.model, vegas, **llama.one, assistant_strategy_config={"no_such_field": 1})
    with pytest.raises(ValueError, match="assistant_strategy.*custom_generate"):
        from_folder(llama.model, vegas, **llama.one, assistant_strategy="plain")


def test_a_repository_with_weights_needs_no_argument(uninstalled, vegas, llama):
    llama.model.save_pretrained(vegas)
    model = AutoModelForCausalLM.from_pretrained(vegas, dtype=torch.float64, trust_remote_code=True)
    out = model.generate(llama.ids[:1], **GREEDY, return_dict_in_generate=True)
    assert torch.equal(out.sequences, llama.stock(llama.ids[:1], max_new_tokens=12))
    assert out.speculation.strategy == "vegas"


def test_nothing_runs_without_trust(uninstalled, vegas, llama):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        llama.model.generate(**llama.one, **GREEDY, custom_generate=vegas, trust_remote_code=False)


PROGRAM = """
import importlib.abc, importlib.metadata, sys
from transformers import GenerationConfig, GenerationMixin, LlamaConfig, LlamaForCausalLM
import torch

original, version = GenerationMixin.generate, importlib.metadata.version
shape = dict(vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**shape)).double().eval()
options = dict(do_sample=False, max_new_tokens=8, pad_token_id=0)
ids = torch.arange(3, 12)[None]
stock = model.generate(ids, **options)

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "hf_specdec":
            raise ModuleNotFoundError("No module named 'hf_specdec'")

def hidden(name):
    if name == "hf-specdec":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

sys.meta_path.insert(0, Hidden())
importlib.metadata.version = hidden
try:
    model.generate(ids, **options, custom_generate=sys.argv[1], trust_remote_code=True)
except ImportError as error:
    print(str(error).splitlines()[-1])
sys.meta_path.pop(0)
importlib.metadata.version = version

out = model.generate(ids, **options, custom_generate=sys.argv[1], trust_remote_code=True, return_dict_in_generate=True)
print(torch.equal(out.sequences, stock), out.speculation.num_draft_tokens > 0)
print("hf_specdec" in sys.modules, GenerationMixin.generate is original)
print(hasattr(GenerationConfig, "assistant_strategy"))
"""


@pytest.mark.full
def test_a_program_that_does_not_import_the_package(vegas, tmp_path):
    """Transformers says what is missing; and what is loaded leaves `generate()` as it was."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_SPECDEC_NO_INSTALL"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, vegas],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["hf-specdec (installed: None)", "True True", "True True", "False"]


# adapters


@pytest.fixture
def draft(llama, tmp_path):
    """A folder with an untrained draft that was cut out of the model."""
    save_draft(
        cut_draft(llama.model, [0]), llama.model, [0], tmp_path / "draft", AssistedConfig(num_assistant_tokens=2)
    )
    return tmp_path / "draft"


@pytest.mark.parametrize("nested", [False, True])
def test_an_adapter_comes_along(nested, draft, llama, tmp_path, uninstalled, monkeypatch):
    """Also a drafter's; the folder that it was exported from is not needed any more."""
    warnings: list[str] = []
    monkeypatch.setattr("hf_specdec.export.logger.warning", warnings.append)
    strategy = str(draft)
    if nested:
        strategy = DiversedConfig(weight=1.0, drafter=AssistedConfig(adapter=str(draft)), num_assistant_tokens=2)
    export_custom_generate(strategy, tmp_path / "repo")
    assert len(warnings) == 1 and "--repo" in warnings[0], "the place on this machine is named in generate.py"
    shutil.rmtree(draft)
    out = from_folder(llama.model, tmp_path / "repo", **llama.batch, local_files_only=True)
    assert torch.equal(out.sequences, llama.stock(**llama.batch, max_new_tokens=12))
    assert out.speculation.num_draft_tokens > 0
    shutil.move(tmp_path / "repo", tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="not there any more.*--repo"):
        from_folder(llama.model, tmp_path / "elsewhere", **llama.batch)


def test_with_a_repository_the_adapter_is_looked_for_there(draft, llama, tmp_path, uninstalled):
    export_custom_generate(str(draft), tmp_path / "repo", repo="some-org/draft")
    code = (tmp_path / "repo/custom_generate/generate.py").read_text()
    assert "STRATEGY = 'some-org/draft'" in code
    assert str(tmp_path) not in code
    with pytest.raises(OSError, match="some-org/draft"):
        from_folder(llama.model, tmp_path / "repo", **llama.one, cache_dir=str(tmp_path / "hub"))


@pytest.mark.full
def test_from_a_hub(tmp_path):
    """In a process of its own, because the client reads the Hub's address when it is imported."""
    names = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_MODULES_CACHE"}
    settings = {name: value for name, value in os.environ.items() if name not in names}
    settings |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost"}
    here = Path(__file__).parent
    arguments = [
        str(families.ROOT / "tests" / "hub_server.py"),
        str(here / "export_cases.py"),
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    arguments += ["--basetemp", str(tmp_path / "base")]
    found = subprocess.run(
        [sys.executable, *arguments], env=settings, capture_output=True, text=True, cwd=families.ROOT, check=False
    )
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert "2 passed" in found.stdout


# the folder


@pytest.mark.parametrize("strategy", ["vegas", "assisted", "diversed"])
def test_the_folder_has_what_users_know(strategy, tmp_path):
    result = CliRunner().invoke(app, ["export", "custom-generate", strategy, str(tmp_path / "repo")])
    assert result.exit_code == 0, result.output
    files = {file.relative_to(tmp_path / "repo").as_posix() for file in (tmp_path / "repo").rglob("*")}
    assert files >= {"custom_generate/generate.py", "custom_generate/requirements.txt", "README.md"}
    assert SpeculationConfig.from_pretrained(tmp_path / "repo") == registry.preset(strategy)
    card = ModelCard.load(tmp_path / "repo/README.md")
    assert card.data.library_name == "transformers"
    assert {"custom_generate", "speculative-decoding", strategy} <= set(card.data.tags)
    for section in ("Base model", "Model compatibility", "Additional arguments", "Output type changes"):
        assert f"\n## {section}\n" in card.text
    example = card.text.split("## Example usage")[1].split("```")[1].removeprefix("python\n")
    compile(example, "example", "exec")
    assert ("assistant_model=draft" in example) == registry.strategy_class(strategy).needs_assistant
    assert ("**lossy**" in card.text) == (strategy == "diversed")


def test_a_release_is_a_lower_bound_and_a_development_version_is_not(monkeypatch):
    """Transformers reads `0.1.0.dev0` as `0.1.0.`, which is no version; `0.1.0` would be above it."""
    monkeypatch.setattr("hf_specdec.export.__version__", "0.2.1")
    assert _requirement() == "hf-specdec>=0.2.1"
    monkeypatch.setattr("hf_specdec.export.__version__", "0.1.0.dev0")
    assert _requirement() == "hf-specdec"


def test_a_folder_that_is_not_empty_needs_force_and_keeps_its_card(vegas, tmp_path):
    with pytest.raises(FileExistsError, match="not empty.*--force"):
        export_custom_generate("plain", vegas)
    card = "a card that somebody wrote\n"
    (tmp_path / "vegas/README.md").write_text(card)
    (tmp_path / "vegas/notes.txt").write_text("kept")
    export_custom_generate("plain", vegas, force=True)
    assert (tmp_path / "vegas/README.md").read_text() == card
    assert (tmp_path / "vegas/notes.txt").exists()
    assert "'plain'" in (tmp_path / "vegas/custom_generate/generate.py").read_text()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        export_custom_generate("plain", tmp_path / "file", force=True)


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.STRATEGIES, "plain", PlainStrategy)
    for strategy, repo, message in [
        ("vegsa", None, "vegsa.*vegas"),
        ("spd", None, "'spd' needs a trained adapter"),
        ("plain", None, "registered in this process"),
        ("vegas", "a/b/c", "a/b/c"),
        ("vegas", "name", "ORG/NAME"),
    ]:
        with pytest.raises(ValueError, match=message):
            export_custom_generate(strategy, tmp_path / "repo", repo=repo)
    with pytest.raises(TypeError, match="int"):
        export_custom_generate(3, tmp_path / "repo")
    assert not (tmp_path / "repo").exists()
