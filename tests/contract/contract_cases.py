"""What the contract's tests share: who meets which test, and what stock gives, made once for all.

A *base* strategy meets every test: three families in `make test`, the others in `make test-all`. A preset differs from
its base in one setting, so it meets the tests that such a setting can break, all of them in `make test-all`: text and
caches in three families, and once its distribution, stops, a processor, statistics, a second turn and an exception.
"""

from __future__ import annotations

import functools

import pytest
import torch
from families import NAMES, family
from tiers import FULL, SOME

from hf_specdec import on_speculation
from hf_specdec.registry import presets


BASES = [name for name in presets() if ":" not in name]
VARIANTS = [name for name in presets() if ":" in name]
some_families = pytest.mark.parametrize("name", SOME)
every_base = pytest.mark.parametrize("strategy", BASES)
every_preset = pytest.mark.parametrize("strategy", [*BASES, *(pytest.param(name, marks=FULL) for name in VARIANTS)])
every_preset_and_some_families = pytest.mark.parametrize(
    "strategy, name",
    [(base, name) for base in BASES for name in SOME] + [pytest.param(name, SOME[0], marks=FULL) for name in VARIANTS],
)


def in_families(strategies):
    """Parametrize by strategy and family: a base meets all families, three of them in `make test`; a preset three."""
    cases = [
        pytest.param(strategy, name, marks=[] if strategy in BASES and name in SOME else FULL)
        for strategy in strategies
        for name in (NAMES if strategy in BASES else SOME)
    ]
    return pytest.mark.parametrize("strategy, name", cases)


def alternating(names, *parts, variants=()):
    """Parametrize such that base strategies take turns: the i-th one meets the i-th of the parts that follow.

    So each strategy meets each single value, and each combination of values is met by some strategy.

    Args:
        names (`str`): arguments of the test after `strategy`, with commas between them.
        parts (`list[tuple]`): values of these.
        variants (`list[tuple]`): values that every preset meets.
    """
    cases = [(base, *values) for place, base in enumerate(BASES) for values in parts[place % len(parts)]]
    cases += [pytest.param(variant, *values, marks=FULL) for variant in VARIANTS for values in variants]
    return pytest.mark.parametrize(f"strategy, {names}", cases)


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
