"""What the contract's tests share: presets and families, and what stock gives, made once for all presets."""

from __future__ import annotations

import functools

import pytest
import torch
from families import NAMES, family

from hf_specdec import on_speculation
from hf_specdec.registry import presets


PRESETS = presets()
every_preset = pytest.mark.parametrize("strategy", PRESETS)
# families that differ in what matters away from the attention itself: plain, hybrid windows, learned positions
SOME = ["llama", "gemma3", "gpt2"]
some_families = pytest.mark.parametrize("name", SOME)
every_family = pytest.mark.parametrize("name", NAMES)


# what stock gives, once for all presets


@functools.cache
def stock_tokens(name, rows, new, *eos):
    """Return stock's greedy output, up to one of `eos`, or to the family's own."""
    model = family(name)
    return model.stock(**model.inputs(rows), max_new_tokens=new, eos_token_id=list(eos) or model.eos)


@functools.cache
def stock_text(name, rows, new=24):
    """Return the new tokens of stock's greedy output, which nothing ends."""
    model = family(name)
    return model.stock(**model.inputs(rows), max_new_tokens=new)[:, model.ids.shape[1] :]


def new_tokens(sequences, width, eos):
    """Return the tokens of each row up to its EOS."""
    rows = []
    for row in sequences[:, width:].tolist():
        rows.append(row[: row.index(eos) + 1] if eos in row else row)
    return rows


def grown(mask, width):
    """Return `mask` with ones appended up to `width` columns."""
    return torch.cat([mask, mask.new_ones(len(mask), width - mask.shape[1])], dim=1)


# statistics


def counted(model, strategy, **kwargs):
    """Return the output of a call and the statistics that it reported, which the output has where it drafted."""
    found = []
    with on_speculation(found.append):
        out = model.ours(strategy, **kwargs, return_dict_in_generate=True)
    (stats,) = found
    assert out.speculation is (stats if stats.num_draft_tokens else None)
    return out, stats


def check_statistics(out, stats, model, rows, exact_rows=True):
    width = model.ids.shape[1]
    if out.sequences.shape[1] == width + 1:  # the prompt's forward gave the only token
        assert stats.num_drafts == 0 and not any(stats.accept_lengths)
        return
    assert len(stats.accept_lengths) == rows
    if exact_rows:
        total = out.sequences.shape[1] - width
        assert [sum(row) + 1 for row in stats.accept_lengths] == [total] * rows
    steps = sum(len(row) for row in stats.accept_lengths)
    emitted = sum(map(sum, stats.accept_lengths))
    least = 0 if "ticks" in stats.method else 1  # a pipeline that is filling up emits nothing
    assert all(length >= least for row in stats.accept_lengths for length in row)
    assert (stats.num_drafts > 0) == (stats.num_draft_tokens > 0) and stats.num_drafts <= steps
    assert stats.num_drafts <= stats.num_draft_tokens
    assert stats.num_accepted_tokens == sum(stats.num_accepted_tokens_per_pos) <= stats.num_draft_tokens
    assert stats.num_accepted_tokens <= emitted <= stats.num_accepted_tokens + steps
    per_pos = stats.num_accepted_tokens_per_pos
    assert per_pos == sorted(per_pos, reverse=True)
    assert stats.mean_tokens_per_step == pytest.approx(emitted / steps if steps else 0.0)
    rate = stats.num_accepted_tokens / stats.num_draft_tokens if stats.num_draft_tokens else 0.0
    assert stats.acceptance_rate == pytest.approx(rate)
    assert stats.target_forwards >= max(len([1 for length in row if length]) for row in stats.accept_lengths)
