"""Pushing and pulling. `test_hub.py` runs this file beside a Hub on localhost, with an empty home and no token."""

from __future__ import annotations

import functools
import json
import pickle
from pathlib import Path

import families
import hub_server
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import load_file, save_file

import hf_specdec
from hf_specdec import (
    AssistedConfig,
    DiversedConfig,
    SPDConfig,
    SpecBoundConfig,
    SpeculationConfig,
    VegasConfig,
    ViaSDConfig,
)
from hf_specdec.card import BEGIN, END
from hf_specdec.commands.main import app
from hf_specdec.configuration import ADAPTER_NAME, CONFIG_NAME
from hf_specdec.generation.methods.diversed.head import DiversedHead
from hf_specdec.generation.methods.spd.depth_map import DepthMap
from hf_specdec.generation.methods.spd.draft_module import PipelineDraftModule
from hf_specdec.generation.methods.specbound.exit_heads import ExitHeads
from hf_specdec.generation.methods.via_sd.slim_model import save_slim
from hf_specdec.generation.models.draft_model import cut_draft, save_draft
from hf_specdec.resolve import push_folder


WRITE, READ = hub_server.WRITE, hub_server.READ
HUB = hub_server.RUNNING[0]
PROMPT = torch.arange(3, 20)[None]
METHODS = ("vegas", "specbound", "via_sd", "diversed", "spd")


@functools.cache
def target():
    return families.build("Llama", seed=3, num_hidden_layers=4)


@functools.cache
def draft():
    return families.perturbed(target())


def vegas(folder):
    VegasConfig(3, min_context=0, min_tokens=2, kv_ratio=0.3).save_pretrained(folder)


def specbound(folder):
    heads, config = ExitHeads(target(), [1, 2], "adapter"), SpecBoundConfig(4, exit_layers=[2], max_depth=3, tau=0.01)
    with torch.no_grad():
        for value in heads.own.parameters():
            value.normal_(0, 0.1)
    heads.save(folder, config, target())


def via_sd(folder, **changes):
    """A mask with a random LoRA, in PEFT's files."""
    tensors = {}
    for index in (0, 2, 3):
        name = f"model.layers.{index}.mlp.down_proj"
        weight = target().get_submodule(name).weight
        tensors[f"base_model.model.{name}.lora_A.weight"] = 0.1 * torch.randn(4, weight.shape[1])
        tensors[f"base_model.model.{name}.lora_B.weight"] = 0.1 * torch.randn(weight.shape[0], 4)
    inner = Path(folder) / "via_sd_slim"
    inner.mkdir(parents=True)
    lora = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "bias": "none", **changes}
    (inner / "adapter_config.json").write_text(json.dumps(lora))
    save_file(tensors, inner / "adapter_model.safetensors")
    config, keep = ViaSDConfig(3, stage_stop_conf=0.0), [True, False, True, True]
    lora = {"trained_cache_mode": "own"}
    save_slim(folder, target(), keep, config=config, calibration={"agreement": 0.9}, lora=lora)


def diversed(folder):
    head = DiversedHead(32, 32)
    with torch.no_grad():
        head.weight.normal_(0, 0.3)
    head.save(folder, DiversedConfig(3), draft(), target())


def spd(folder):
    module = PipelineDraftModule(target(), DepthMap(4, 2), [3])
    module.save(folder, SPDConfig(), target())


def cut(folder):
    save_draft(cut_draft(target(), [0, 3]), target(), [0, 3], folder, AssistedConfig(2))


def generated(strategy, **kwargs):
    """Generate greedily; returns the tokens and what the statistics say."""
    hf_specdec.unload(target())
    if strategy in ("org/via_sd", "org/diversed") or Path(strategy).name in ("via_sd", "diversed"):
        kwargs = {"assistant_model": draft(), **kwargs}
    torch.manual_seed(0)
    out = target().generate(
        PROMPT, assistant_strategy=strategy, max_new_tokens=14, do_sample=False, return_dict_in_generate=True, **kwargs
    )
    return out.sequences.tolist(), out.speculation.to_dict()


@functools.cache
def stock():
    return target().generate(PROMPT, max_new_tokens=14, do_sample=False).tolist()


@pytest.fixture
def folder(tmp_path):
    """A function that writes a method's folder and returns its path."""

    def write(name, **changes):
        torch.manual_seed(1)
        globals()[name](tmp_path / name, **changes)
        return tmp_path / name

    return write


def edited(folder, change):
    """Change a folder's config file."""
    values = json.loads((folder / CONFIG_NAME).read_text())
    change(values)
    (folder / CONFIG_NAME).write_text(json.dumps(values))
    return folder


def hand_made(name, folder, private=False):
    """Make a repository of a folder's files as they are, past all checks."""
    repo = HUB.repos[name] = hub_server.Repo(private)
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    repo.add("main", files, "by hand")
    return repo


class TestOnline:
    @pytest.mark.parametrize("name", METHODS)
    def test_a_pushed_strategy_is_pulled_by_its_name(self, name, folder, monkeypatch):
        local = folder(name)
        config, files = SpeculationConfig.from_pretrained(local), {file.name for file in local.rglob("*.*")}
        if name == "via_sd":  # the command, with a token that was stored
            monkeypatch.setenv("HF_TOKEN", WRITE)
            app(["push", str(local), "org/via_sd", "--message", "first"], standalone_mode=False)
            monkeypatch.delenv("HF_TOKEN")
        elif name == "spd":
            push_folder(local, "org/spd", token=WRITE, commit_message="first")
        else:
            assert config.push_to_hub(f"org/{name}", token=WRITE, commit_message="first").startswith(HUB.url)
        repo = HUB.repos[f"org/{name}"]
        assert repo.messages[1:] == ["first"]  # one commit
        assert {Path(file).name for file in repo.files()} == files | {"README.md"}
        pulled = SpeculationConfig.from_pretrained(f"org/{name}")
        assert type(pulled) is type(config)
        ours, theirs = pulled.to_dict(), config.to_dict()
        assert {**ours, "adapter": 0} == {**theirs, "adapter": 0}
        if name != "vegas":
            assert Path(HF_HUB_CACHE) in Path(pulled.adapter).parents
        found, expected = generated(f"org/{name}"), generated(str(local))
        assert found == expected
        assert found[1]["strategy"] == name and found[1]["num_drafts"] > 0
        if name != "diversed":
            assert found[0] == stock()

    def test_the_card_says_what_it_is(self, folder):
        push_folder(folder("specbound"), "org/card", token=WRITE)
        text = HUB.repos["org/card"].files()["README.md"].decode()
        data = ModelCard(text).data
        assert (data.library_name, data.pipeline_tag) == ("hf_specdec", "text-generation")
        assert data.tags == ["speculative-decoding", "hf_specdec", "specbound"]
        for part in ('assistant_strategy="org/card"', "2604.12247", "Lossless", "not measured", "transformers"):
            assert part in text

    def test_results_are_shown_in_the_card(self, folder, monkeypatch, tmp_path):
        monkeypatch.setenv("HF_TOKEN", WRITE)
        figures = {"context": 9, "batch": 1, "new_tokens": 4, "acceptance": None, "tokens_per_step": None}
        rows = [
            {**figures, "name": "static", "tokens_per_second": 50.0, "ms_per_token": 20.0},
            {**figures, "name": "vegas", "tokens_per_second": 100.0, "ms_per_token": 10.0, "tokens_per_step": 3.25},
        ]
        values = {"command": "hf-specdec bench --batch 1", "environment": {"torch": "9.9"}, "measurements": rows}
        (tmp_path / "results.json").write_text(json.dumps(values))
        command = ["push", str(folder("vegas")), "org/results", "--results", str(tmp_path / "results.json")]
        app(command, standalone_mode=False)
        text = HUB.repos["org/results"].files()["README.md"].decode()
        assert "| vegas | 100.0 | 2.00 | 3.25 |  |" in text
        assert "hf-specdec bench --batch 1" in text and "torch 9.9" in text
        (tmp_path / "results.json").write_text(json.dumps({**values, "measurements": [{"name": "a kernel"}]}))
        with pytest.raises(ValueError, match=r"results.json.*bench --json"):
            app(command, standalone_mode=False)

    def test_a_second_push_keeps_what_was_written_into_the_card(self):
        VegasConfig(3).push_to_hub("org/again", token=WRITE)
        repo = HUB.repos["org/again"]
        card = repo.files()["README.md"].decode()
        mine = card.replace("library_name: hf_specdec", "license: mit").replace("# vegas", "# Mine\n\nMy words.")
        assert mine != card
        repo.put(README__md=(mine + "My end.\n").encode())
        VegasConfig(4).push_to_hub("org/again", token=WRITE)
        text = repo.files()["README.md"].decode()
        assert "# Mine\n\nMy words." in text and text.endswith("My end.\n")
        assert ModelCard(text).data.license == "mit" and ModelCard(text).data.library_name == "hf_specdec"
        assert "| `num_assistant_tokens` | 4 |" in text and "| `num_assistant_tokens` | 3 |" not in text
        # without the markers nothing but front matter is added
        plain = "---\nlicense: mit\n---\n\nWords only.\n"
        repo.put(README__md=plain.encode())
        VegasConfig(5).push_to_hub("org/again", token=WRITE)
        text = repo.files()["README.md"].decode()
        assert text.startswith("---\nlicense: mit\n") and text.endswith("\n---\n\nWords only.\n")
        assert BEGIN not in text and END not in text
        assert SpeculationConfig.from_pretrained("org/again") == VegasConfig(5)

    def test_revisions(self, folder, tmp_path):
        VegasConfig(2).push_to_hub("org/branches", token=WRITE)
        first = HUB.repos["org/branches"].branches["main"]
        VegasConfig(3).push_to_hub("org/branches", token=WRITE, revision="three")
        VegasConfig(4).push_to_hub("org/branches", token=WRITE)
        for revision, tokens in ((None, 4), ("three", 3), (first, 2)):
            config = SpeculationConfig.from_pretrained("org/branches", revision=revision, cache_dir=tmp_path / "c")
            assert config.num_assistant_tokens == tokens
            assert hf_specdec.decoding_loop("org/branches", revision=revision).config.num_assistant_tokens == tokens
        assert (tmp_path / "c" / "models--org--branches").is_dir()
        small = {"assistant_strategy_config": {"min_context": 0, "min_tokens": 2}}
        for revision, tokens in (("three", 3), (first, 2)):
            found = generated("org/branches", revision=revision, **small)[1]
            assert len(found["num_accepted_tokens_per_pos"]) == tokens
        with pytest.raises(OSError, match=r"'org/branches' has no revision 'four'"):
            SpeculationConfig.from_pretrained("org/branches", revision="four")

    def test_config_and_adapter_are_of_one_revision(self, folder, monkeypatch):
        """The repository changes between the download of the config and that of the tensors."""
        from hf_specdec import artefacts

        local = folder("specbound")
        push_folder(local, "org/moving", token=WRITE)
        repo, real = HUB.repos["org/moving"], artefacts.hf_hub_download
        old = repo.files()[ADAPTER_NAME]

        def moving(repo_id, name, **kwargs):
            path = real(repo_id, name, **kwargs)
            if name == CONFIG_NAME:
                repo.put(specdec_adapter__safetensors=b"other")
            return path

        monkeypatch.setattr(artefacts, "hf_hub_download", moving)
        config = SpeculationConfig.from_pretrained("org/moving")
        assert (Path(config.adapter) / ADAPTER_NAME).read_bytes() == old

    def test_a_private_repository_needs_a_token(self, folder):
        push_folder(folder("specbound"), "org/secret", token=WRITE, private=True)
        assert HUB.repos["org/secret"].private
        for token in (None, "hf_wrong"):
            with pytest.raises(OSError, match=r"'org/secret'.*private.*`token`.*hf auth login"):
                generated("org/secret", token=token)
        assert generated("org/secret", token=READ)[0] == stock()
        with pytest.raises(ValueError, match=r"exists and is private.*private=False"):
            push_folder(folder("vegas"), "org/secret", token=WRITE, private=False)

    @pytest.mark.parametrize("token", [None, READ])
    def test_pushing_needs_a_token_that_may_write(self, token):
        with pytest.raises(OSError, match=r"Nothing was uploaded.*'org/new'.*`token`.*hf auth login"):
            VegasConfig().push_to_hub("org/new", token=token)
        assert "org/new" not in HUB.repos

    def test_an_adapter_that_did_not_arrive_whole_is_not_used(self, folder):
        push_folder(folder("specbound"), "org/broken", token=WRITE)
        HUB.cut.add(ADAPTER_NAME)
        with pytest.raises(OSError, match=rf"'org/broken'.*{ADAPTER_NAME}"):
            generated("org/broken")
        repo = Path(HF_HUB_CACHE) / "models--org--broken"
        assert not list(repo.rglob("*.safetensors")) and not list(repo.rglob("*.incomplete"))
        with pytest.raises(FileNotFoundError, match=rf"{ADAPTER_NAME}.*not in the cache.*local_files_only=True"):
            generated("org/broken", local_files_only=True)
        HUB.cut.clear()
        assert generated("org/broken")[0] == stock()

    def test_the_hub_is_asked_once_until_it_is_unloaded(self, folder):
        push_folder(folder("specbound"), "org/once", token=WRITE)
        generated("org/once")
        before = HUB.requests.total()
        target().generate(PROMPT, assistant_strategy="org/once", max_new_tokens=4)
        assert HUB.requests.total() == before
        generated("org/once")  # unloads first
        assert HUB.requests.total() > before
        # an adapter is a Hub name too
        config = SpecBoundConfig(4, exit_layers=[2], max_depth=3, tau=0.01, adapter="org/once")
        out = target().generate(PROMPT, assistant_strategy=config, max_new_tokens=14, do_sample=False)
        assert out.tolist() == stock()

    def test_an_adapter_of_another_model_names_the_repository(self, folder):
        push_folder(folder("specbound"), "org/other", token=WRITE)
        other = families.build("Llama", seed=4, num_hidden_layers=4)
        with pytest.raises(ValueError, match=r"'org/other' on the Hub.*made for another `model`.*hf-specdec train"):
            other.generate(PROMPT, assistant_strategy="org/other", max_new_tokens=4)
        deeper = families.build("Llama", seed=3, num_hidden_layers=5)
        with pytest.raises(ValueError, match=r"'org/other' on the Hub.*num_hidden_layers 4"):
            deeper.generate(PROMPT, assistant_strategy="org/other", max_new_tokens=4)

    def test_names_that_lead_nowhere(self, tmp_path):
        with pytest.raises(OSError, match=r"'org/nothing' does not exist, or is private.*hf auth login"):
            SpeculationConfig.from_pretrained("org/nothing")
        with pytest.raises(OSError, match=r"assistant_strategy='org/nothing'.*vegas.*does not exist"):
            generated("org/nothing")
        with pytest.raises(ValueError, match=r"'or g/nothing!' is neither a folder nor a Hub repository's name"):
            SpeculationConfig.from_pretrained("or g/nothing!")
        (tmp_path / "config.json").write_text("{}")
        hand_made("org/model", tmp_path)
        with pytest.raises(FileNotFoundError, match=rf"'org/model' holds no {CONFIG_NAME}.*push_to_hub"):
            SpeculationConfig.from_pretrained("org/model")

    @pytest.mark.parametrize(
        "name, change, message",
        [
            ("newer", lambda v: v["adapter"].update(format_version=2), "format version 2.*pip install -U"),
            (
                "unknown",
                lambda v: v.update(strategy="next", hf_specdec_version="99.0"),
                "'next'.*99.0.*pip install -U",
            ),
            ("wrong", lambda v: v.update(strategy="nonsense"), "Unknown strategy 'nonsense'.*vegas"),
            ("field", lambda v: v.update(taau=1), "no field taau"),
            ("value", lambda v: v.update(tau="high"), "`tau` must be"),
            ("elsewhere", lambda v: v.update(adapter="org/specbound"), "names an adapter elsewhere.*org/specbound"),
            ("up", lambda v: v["adapter"].update(files=["../x.json"]), r"'../x.json'.*Nothing was loaded"),
            ("root", lambda v: v["adapter"].update(files=["/x.json"]), "'/x.json'.*inside its own folder"),
            ("files", lambda v: v["adapter"].update(files="x.json"), "no list of names"),
            ("record", lambda v: v["adapter"].pop("layers"), "record without layers"),
            ("kind", lambda v: v["adapter"].update(kind="draft"), "kind 'draft'"),
        ],
        ids=lambda value: value if isinstance(value, str) and value.isalpha() else "",
    )
    def test_configs_that_do_not_load_name_their_repository(self, name, change, message, folder):
        hand_made(f"org/bad-{name}", edited(folder("specbound"), change))
        with pytest.raises((ValueError, TypeError), match=rf"(?s)'org/bad-{name}' on the Hub.*{message}"):
            generated(f"org/bad-{name}")

    def test_files_that_are_not_what_they_should_be(self, folder):
        local = folder("specbound")
        repo = hand_made("org/damaged", local)
        repo.put(specdec_config__json=b"{'no': json}")
        with pytest.raises(ValueError, match=rf"{CONFIG_NAME} in 'org/damaged' on the Hub.* is not JSON"):
            generated("org/damaged")
        repo.put(specdec_config__json=b"[1]")
        with pytest.raises(ValueError, match=r"'org/damaged' on the Hub.*JSON object, got list"):
            generated("org/damaged")
        repo.put(specdec_config__json=(local / CONFIG_NAME).read_bytes(), specdec_adapter__safetensors=None)
        with pytest.raises(FileNotFoundError, match=rf"'org/damaged' holds no {ADAPTER_NAME}.*pushed again"):
            generated("org/damaged")
        repo.put(specdec_adapter__safetensors=(local / ADAPTER_NAME).read_bytes()[:-9])
        with pytest.raises(ValueError, match=rf"{ADAPTER_NAME} in 'org/damaged' on the Hub.*no whole safetensors"):
            generated("org/damaged")

    def test_newer_settings_warn(self, folder, caplog):
        from transformers.utils import logging

        values = {**VegasConfig(3).to_dict(), "hf_specdec_version": "99.0", "later": 1}
        local = folder("vegas")
        (local / CONFIG_NAME).write_text(json.dumps(values))
        hand_made("org/later", local)
        root = logging.get_logger("hf_specdec")
        root.addHandler(caplog.handler)
        try:
            assert SpeculationConfig.from_pretrained("org/later") == VegasConfig(3)
        finally:
            root.removeHandler(caplog.handler)
        assert "ignoring later" in caplog.text and "99.0" in caplog.text and "pip install -U" in caplog.text


class Marker:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


class TestOnlineCode:
    @pytest.mark.parametrize("place", ["named", "instead", "weights", "beside"])
    @pytest.mark.parametrize("name", ["specbound", "via_sd"])
    def test_no_pickle_is_read(self, name, place, folder, tmp_path):
        """One that the record names, one under a safetensors name, and ones that lie where PEFT and torch look."""
        local, mark = folder(name), tmp_path / "mark"
        bomb = pickle.dumps(Marker(mark))
        tensors = next(local.rglob("*.safetensors"))
        pickles = [tensors.with_suffix(".bin"), local / "adapter_model.bin", local / "pytorch_model.bin"]
        expected = None
        if place == "instead":
            tensors.write_bytes(bomb)
            expected = (ValueError, r"no whole safetensors file")
        elif place == "weights":
            tensors.unlink()
            expected = (FileNotFoundError, tensors.name)
        elif place == "named":
            file = pickles[0].relative_to(local).as_posix()
            edited(local, lambda values: values["adapter"].update(files=[file]))
            expected = (ValueError, rf"names the file '{file}'.*can carry code.*Nothing was loaded")
        for path in pickles:
            path.write_bytes(bomb)
        repo = f"org/pickle-{name}-{place}"
        hand_made(repo, local)
        kwargs = {"assistant_model": draft()} if name == "via_sd" else {}
        if expected is None:  # lies there, and is not even downloaded
            assert generated(repo, **kwargs)[0] == stock()
        else:
            with pytest.raises(expected[0], match=rf"(?s){repo}.*{expected[1]}"):
                generated(repo, **kwargs)
        assert not mark.exists()
        assert not list((Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}").rglob("*.bin"))
        assert pickle.loads(bomb).close() is None and mark.exists()  # it would have worked

    def test_peft_settings_lead_nowhere(self, folder, tmp_path):
        """Neither `auto_mapping` nor the name of a base model is followed."""
        code = {"base_model_class": "Evil", "parent_library": "evil"}
        local = folder("via_sd", auto_mapping=code, base_model_name_or_path="org/evil", trust_remote_code=True)
        (local / "via_sd_slim" / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
        hand_made("org/mapped", local)
        before = HUB.requests.copy()
        assert generated("org/mapped", assistant_model=draft())[0] == stock()
        asked = HUB.requests - before
        assert asked["HEAD resolve"] <= 3 and asked["GET download"] <= 1  # config, LoRA config and LoRA
        assert not (tmp_path / "mark").exists()

    @pytest.mark.parametrize("name", ["x.bin", "sub/x.pt", "x.pkl", "other.safetensors"])
    def test_weights_of_other_formats_are_not_uploaded(self, name, folder):
        local = folder("specbound")
        (local / name).parent.mkdir(exist_ok=True)
        (local / name).write_bytes(b"weights")
        before = HUB.requests.total()
        with pytest.raises(ValueError, match=rf"{name}.*does not name.*move the others away"):
            push_folder(local, "org/refused", token=WRITE)
        assert HUB.requests.total() == before

    def test_folders_that_are_not_whole_are_not_uploaded(self, folder, tmp_path):
        before = HUB.requests.total()
        with pytest.raises(FileNotFoundError, match=r"nowhere"):
            push_folder(tmp_path / "nowhere", "org/refused", token=WRITE)
        with pytest.raises(FileNotFoundError, match=CONFIG_NAME):
            push_folder(tmp_path, "org/refused", token=WRITE)
        local = folder("specbound")
        tensors = (local / ADAPTER_NAME).read_bytes()
        (local / ADAPTER_NAME).write_bytes(tensors[:-3])
        with pytest.raises(ValueError, match=rf"{ADAPTER_NAME}.*no safetensors file"):
            push_folder(local, "org/refused", token=WRITE)
        (local / ADAPTER_NAME).unlink()
        with pytest.raises(FileNotFoundError, match=rf"holds no {ADAPTER_NAME}"):
            push_folder(local, "org/refused", token=WRITE)
        edited(local, lambda values: values.update(adapter="elsewhere"))
        with pytest.raises(ValueError, match=r"elsewhere.*save_pretrained"):
            push_folder(local, "org/refused", token=WRITE)
        assert HUB.requests.total() == before

    def test_hidden_files_and_checkpoints_stay_behind(self, folder):
        local = folder("specbound")
        for name in (".cache/x.bin", "checkpoint/state.pt", "__pycache__/x.pyc"):
            (local / name).parent.mkdir()
            (local / name).write_bytes(b"x")
        push_folder(local, "org/tidy", token=WRITE)
        assert set(HUB.repos["org/tidy"].files()) == {CONFIG_NAME, ADAPTER_NAME, "README.md"}


class TestOnlineKeywords:
    @pytest.mark.parametrize(
        "keyword", [{"revision": "main"}, {"token": READ}, {"cache_dir": "x"}, {"local_files_only": True}], ids=str
    )
    def test_hub_keywords_are_for_hub_names(self, keyword, folder):
        (name,) = keyword
        for strategy in ("vegas", str(folder("vegas")), VegasConfig()):
            for call in (target().generate, None):
                with pytest.raises(ValueError, match=rf"`{name}`.*only for.*Hub repository"):
                    if call is None:
                        hf_specdec.decoding_loop(strategy, **keyword)
                    else:
                        call(PROMPT, assistant_strategy=strategy, max_new_tokens=2, **keyword)
        with pytest.raises(ValueError, match=rf"{name}.*folder"):
            SpeculationConfig.from_pretrained(folder("specbound"), **keyword)

    @pytest.mark.parametrize("extra", [{}, {"assistant_strategy": "off"}])
    def test_without_a_strategy_they_are_left_to_stock(self, extra):
        texts = []
        for call in (lambda **k: target().generate(PROMPT, max_new_tokens=2, **extra, **k), original):
            with pytest.raises(ValueError) as caught:
                call(revision="main", token="x")
            texts.append(str(caught.value))
        assert texts[0] == texts[1] and "revision" in texts[0]


def original(**kwargs):
    return type(target()).generate.__wrapped__(target(), PROMPT, max_new_tokens=2, **kwargs)


class TestOnlineNested:
    def test_a_drafter_brings_its_adapter(self, folder, tmp_path):
        config = DiversedConfig(2, weight=1.0, drafter=AssistedConfig(2, adapter=str(folder("cut"))))
        config.push_to_hub("org/nested", token=WRITE)
        assert f"drafter/{ADAPTER_NAME}" in HUB.repos["org/nested"].files()
        pulled = SpeculationConfig.from_pretrained("org/nested")
        assert Path(pulled.drafter.adapter).name == "drafter"
        tensors = load_file(folder_of(pulled.drafter) / ADAPTER_NAME)
        assert tensors.keys() == load_file(folder_of(config.drafter) / ADAPTER_NAME).keys()
        found = generated("org/nested")
        assert found[0] == stock() and found[1]["num_drafts"] > 0

    def test_a_saved_folder_can_be_moved(self, folder, tmp_path):
        for name in ("specbound", "cut"):
            source = folder(name)
            config = SpeculationConfig.from_pretrained(source)
            (source / "README.md").write_text("Its card.\n")
            config.save_pretrained(tmp_path / "a")
            assert (tmp_path / "a" / "README.md").read_text() == "Its card.\n"
            (tmp_path / "a").rename(tmp_path / f"moved-{name}")
            source.rename(tmp_path / f"gone-{name}")
            assert generated(str(tmp_path / f"moved-{name}"))[0] == stock()
        # saving into the adapter's own folder changes the settings only
        config = SpeculationConfig.from_pretrained(tmp_path / "moved-cut").override(num_assistant_tokens=7)
        config.save_pretrained(tmp_path / "moved-cut")
        assert SpeculationConfig.from_pretrained(tmp_path / "moved-cut") == config
        with pytest.raises(FileNotFoundError, match=r"'no/where/at-all' is neither"):
            AssistedConfig(adapter="no/where/at-all").save_pretrained(tmp_path / "new")


def folder_of(config):
    return Path(config.adapter)


class TestOffline:
    @pytest.mark.parametrize("name", METHODS)
    def test_what_was_pulled_is_there(self, name):
        found = generated(f"org/{name}")
        assert found[1]["strategy"] == name and found[1]["num_drafts"] > 0
        if name != "diversed":
            assert found[0] == stock()
        assert not HUB.requests

    def test_what_was_not_pulled_is_not(self):
        for kwargs, setting in (({}, "HF_HUB_OFFLINE=1"), ({"local_files_only": True}, "local_files_only=True")):
            with pytest.raises(FileNotFoundError, match=rf"'org/never'.*{CONFIG_NAME}.*not in the cache.*{setting}"):
                SpeculationConfig.from_pretrained("org/never", **kwargs)
            with pytest.raises(OSError, match=rf"assistant_strategy='org/never'.*{setting}"):
                generated("org/never", **kwargs)
        with pytest.raises(OSError, match=r"not reached.*'org/never'"):
            VegasConfig().push_to_hub("org/never", token=WRITE)
