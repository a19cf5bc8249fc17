"""`Text`: one owner of the tokens, by position and by column; what is written speculatively is taken back."""

from __future__ import annotations

import pytest
import torch

from hf_specdec.generation import text as text_module
from hf_specdec.generation.prompt import Prompt
from hf_specdec.generation.text import Text


PAD = 9


def make(lengths=(4, 2), max_length=10):
    """Return a text of rows that count up from 10, 20, ..., left-padded to the longest."""
    width = max(lengths)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    ids = torch.where(mask, torch.arange(width) + 10 * (1 + torch.arange(len(lengths)))[:, None], PAD)
    return Text(Prompt.read(ids, mask.long(), None, None), max_length, PAD)


class Elsewhere(Text):
    """Keeps its device copy apart from the host's, as on an accelerator."""

    def __init__(self, prompt, max_length, pad_token):
        super().__init__(prompt, max_length, pad_token)
        self.host = self.host.clone()


def test_a_prompt_by_position_and_by_column():
    text = make()
    assert text.host.tolist() == [[10, 11, 12, 13, *[PAD] * 6], [22, 23, *[PAD] * 8]]
    assert text.by_column(4).tolist() == [[10, 11, 12, 13], [PAD, PAD, 22, 23]]
    assert text.lengths([0, 1]) == [4, 2] and text.columns == [4, 4]
    assert text.tail([1, 0], 2).tolist() == [[22, 23], [12, 13]]


@pytest.mark.parametrize("kind", [Text, Elsewhere])
def test_writing_and_cutting(kind):
    prompt = make()
    text = kind(Prompt.read(prompt.by_column(4), torch.tensor([[1] * 4, [0, 0, 1, 1]]), None, None), 10, PAD)
    text.write({0: [1, 2, 3], 1: [4]})
    assert text.columns == [7, 5] and text.lengths([1, 0]) == [3, 7]
    assert text.by_column(8).tolist() == [[10, 11, 12, 13, 1, 2, 3, PAD], [PAD, PAD, 22, 23, 4, PAD, PAD, PAD]]
    assert text.tail([0, 1], 1).tolist() == [[3], [4]]
    assert [text.column(index).tolist() for index in (4, 5)] == [[1, 4], [2, PAD]]
    text.cut(0, 5)
    assert text.by_column(7).tolist() == [[10, 11, 12, 13, 1, PAD, PAD], [PAD, PAD, 22, 23, 4, PAD, PAD]]
    assert torch.equal(text.host, text.tokens.cpu())
    text.write({0: [7]})
    assert text.tail([0], 3).tolist() == [[13, 1, 7]]


@pytest.mark.parametrize("kind", [Text, Elsewhere])
@pytest.mark.parametrize("fails", [False, True])
def test_speculated_tokens_are_taken_back(kind, fails):
    prompt = make()
    text = kind(Prompt.read(prompt.by_column(4), torch.tensor([[1] * 4, [0, 0, 1, 1]]), None, None), 10, PAD)
    before = text.by_column(10)
    try:
        with text.speculated({0: [1, 2], 1: [3]}):
            assert text.tail([0, 1], 1).tolist() == [[2], [3]]
            with text.speculated({1: [5, 6]}):
                assert text.tail([1], 3).tolist() == [[3, 5, 6]]
            assert text.tail([1], 2).tolist() == [[23, 3]]
            if fails:
                raise KeyError("raised on purpose")
    except KeyError:
        assert fails
    assert text.columns == [4, 4]
    assert torch.equal(text.by_column(10), before)
    assert torch.equal(text.host, text.tokens.cpu())


def test_one_upload_a_round(monkeypatch):
    """What a round wrote, and where its rows end, travel together."""
    prompt = make()
    text = Elsewhere(Prompt.read(prompt.by_column(4), torch.tensor([[1] * 4, [0, 0, 1, 1]]), None, None), 10, PAD)
    sent, upload = [], text_module.upload
    monkeypatch.setattr(text_module, "upload", lambda *given: sent.append(given) or upload(*given))
    for token in (1, 2, 3):
        text.write({0: [token], 1: [token + 1, token + 2]})
        text.tail([0, 1], 1)
        text.tail([0, 1], 2)
        assert text.tokens[0, text.lengths([0])[0] - 1] == token
        assert len(sent) == token
    assert torch.equal(text.host, text.tokens.cpu())


def test_drafts_may_pass_the_last_column():
    text = make(max_length=6)
    text.write({0: [1, 2]})
    assert text.by_column(8).tolist() == [[10, 11, 12, 13, 1, 2, PAD, PAD], [PAD, PAD, 22, 23, *[PAD] * 4]]
