"""Exported repositories on the Hub. `test_export.py` runs this file beside a Hub on localhost, with an empty home."""

from __future__ import annotations

import families
import hub_server
import pytest
import torch

import hf_specdec
from hf_specdec import AssistedConfig
from hf_specdec.export import export_custom_generate
from hf_specdec.generation.models.draft_model import cut_draft, save_draft
from hf_specdec.resolve import push_folder


WRITE, READ = hub_server.WRITE, hub_server.READ
HUB = hub_server.RUNNING[0]
GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture
def uninstalled():
    hf_specdec.uninstall()
    yield
    hf_specdec.install()


def from_hub(model, name, **kwargs):
    return model.generate(
        custom_generate=name, trust_remote_code=True, return_dict_in_generate=True, **{**GREEDY, **kwargs}
    )


def test_settings_come_with_the_code(uninstalled, llama, tmp_path):
    export_custom_generate(families.configured("vegas"), tmp_path / "vegas", repo="org/vegas")
    push_folder(tmp_path / "vegas", "org/vegas", token=WRITE)
    assert {"custom_generate/generate.py", "custom_generate/requirements.txt"} <= set(HUB.repos["org/vegas"].files())
    card = HUB.repos["org/vegas"].files()["README.md"].decode()
    assert 'custom_generate="org/vegas"' in card
    assert 'assistant_strategy="org/vegas"' in card
    out = from_hub(llama.model, "org/vegas", **llama.batch)
    assert torch.equal(out.sequences, llama.stock(**llama.batch, max_new_tokens=12))
    assert out.speculation.strategy == "vegas"


def test_an_adapter_of_a_private_repository_comes_with_the_same_token_and_revision(uninstalled, llama, tmp_path):
    for tokens, branch in ((2, "main"), (4, "wide")):
        folder = tmp_path / branch
        config = AssistedConfig(num_assistant_tokens=tokens)
        save_draft(cut_draft(llama.model, [0]), llama.model, [0], tmp_path / f"draft-{tokens}", config)
        export_custom_generate(str(tmp_path / f"draft-{tokens}"), folder, repo="org/draft")
        push_folder(folder, "org/draft", token=WRITE, private=True, revision=branch)
    expected = llama.stock(**llama.one, max_new_tokens=12)
    for revision, tokens in ((None, 2), ("wide", 4)):
        out = from_hub(llama.model, "org/draft", **llama.one, revision=revision, token=READ)
        assert torch.equal(out.sequences, expected)
        assert len(out.speculation.num_accepted_tokens_per_pos) == tokens
    with pytest.raises(OSError, match="org/draft"):
        from_hub(llama.model, "org/draft", **llama.one, cache_dir=str(tmp_path / "empty"))
