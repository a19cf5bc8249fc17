"""The benchmark measures what it says, ratios are against the fastest stock arm, and the command refuses bad input."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from families import tiny_llama
from rich.console import Console
from typer.testing import CliRunner

from hf_specdec import VegasConfig
from hf_specdec.bench import report
from hf_specdec.bench.calibrate import break_even, calibrate_vegas
from hf_specdec.bench.run import Arm, Measurement, environment, make_arm, measure, prefill, to_json
from hf_specdec.commands import main as cli
from hf_specdec.texts import load_prompts


@pytest.fixture(scope="module")
def model():
    return tiny_llama(
        vocab_size=64, intermediate_size=48, max_position_embeddings=256, pad_token_id=0, eos_token_id=1
    ).float()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, 64, (2, 40), generator=torch.Generator().manual_seed(1))


def test_every_arm_decodes_the_same_text_from_one_prefill(model, ids):
    arms = [make_arm(name, None) for name in ("default", "static", "plain", "vegas@min_context=0,min_tokens=8")]
    seen = []
    found = measure(model, ids, arms, new_tokens=12, repeats=2, progress=seen.append)
    assert [m.name for m in found] == ["default", "static", "plain", "vegas@min_context=0,min_tokens=8"]
    assert len(seen) == len(arms) * 3
    for m in found:
        assert m.same_tokens == 1.0, m.name
        assert len(m.repeats) == 2 and m.ms_per_token > 0
        assert m.tokens_per_second == pytest.approx(1000 * m.batch / m.ms_per_token)
    vegas = found[-1]
    assert vegas.tokens_per_step >= 1 and vegas.draft_ms > 0 and vegas.verify_ms > 0 and vegas.modelled > 0
    assert found[0].tokens_per_step is None
    json.dumps({"environment": environment(), "measurements": to_json(found)})


def test_prefill_leaves_out_the_last_token(model, ids):
    cache, seconds = prefill(model, ids)
    assert cache.get_seq_length() == ids.shape[1] - 1 and seconds > 0


def test_stock_modes_of_one_row_are_left_out_for_more(model, ids):
    arms = [make_arm("default", None), make_arm("stock_prompt_lookup", None)]
    assert [m.name for m in measure(model, ids, arms, 4, 1)] == ["default"]
    assert [m.name for m in measure(model, ids[:1], arms, 4, 1)] == ["default", "stock_prompt_lookup"]


def test_stock_speculative_arms_write_the_text_of_plain_decoding(model, ids):
    """Given a cache, stock writes another one: these arms run the prompt themselves."""
    arms = [make_arm("default", None), make_arm("stock_prompt_lookup", None), make_arm("stock_assisted", model)]
    assert [m.same_tokens for m in measure(model, ids[:1], arms, 12, 1)] == [1.0, 1.0, 1.0]


def test_arms_that_need_a_second_model_say_so():
    for name in ("assisted", "stock_assisted"):
        with pytest.raises(ValueError, match="--assistant"):
            make_arm(name, None)
    with pytest.raises(ValueError, match="no field"):
        make_arm("vegas@kv_raito=0.1", None)
    assert make_arm("vegas@kv_ratio=0.1,selection=window", None).options["assistant_strategy"] == VegasConfig(
        kv_ratio=0.1, selection="window"
    )


@pytest.mark.parametrize(("new_tokens", "repeats"), [(1, 1), (4, 0)])
def test_nothing_to_measure_is_refused(model, ids, new_tokens, repeats):
    with pytest.raises(ValueError, match="new_tokens"):
        measure(model, ids, [Arm("default")], new_tokens, repeats)


def row(name: str, ms: float) -> Measurement:
    return Measurement(name, 100, 1, 10, 1000 / ms, ms, [ms])


def test_ratios_are_against_the_fastest_stock_arm():
    rows = [row("default", 30.0), row("static", 20.0), row("plain", 16.0), row("vegas", 10.0)]
    assert report.fastest_stock(rows).name == "static"
    console = Console(record=True, width=200)
    console.print(report.table(rows))
    line = next(line for line in console.export_text().splitlines() if "vegas" in line)
    assert " 2.00 " in line and " 1.60 " in line
    with pytest.raises(ValueError, match="default, static"):
        report.fastest_stock(rows[2:])


@pytest.mark.parametrize(
    ("gains", "wanted"),
    [
        ([0.5, 1.5, 2.0], 150),
        ([1.1, 1.2, 1.3], 100),
        ([0.5, 0.9, 0.99], None),
        ([1.2, 0.8, 1.2], 300),
        ([1, 1, 1], None),
    ],
)
def test_break_even_is_where_every_longer_context_gains(gains, wanted):
    assert break_even([100, 200, 400], gains) == wanted


def test_calibration_measures_each_context(model, ids):
    found, rows = calibrate_vegas(
        model,
        lambda length: ids[:1, :length],
        [16, 32],
        config=VegasConfig(min_tokens=4, min_context=10_000),
        new_tokens=8,
        repeats=1,
    )
    assert [(m.name, m.context) for m in rows] == [("plain", 16), ("vegas", 16), ("plain", 32), ("vegas", 32)]
    assert rows[1].tokens_per_step is not None, "the calibrated config's own min_context must not switch drafts off"
    assert found is None or 16 <= found <= 32
    with pytest.raises(ValueError, match="rising"):
        calibrate_vegas(model, lambda length: ids[:1, :length], [32, 16])


def test_the_command_lists_strategies_and_refuses_bad_numbers(monkeypatch, capsys):
    listed = CliRunner().invoke(cli.app, ["list"])
    assert listed.exit_code == 0 and "vegas" in listed.output
    for arguments in (["bench", "--batch", "0"], ["calibrate", "plain"], ["demo", "--batches", "x"]):
        monkeypatch.setattr(sys, "argv", ["hf-specdec", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
    assert "Error" in capsys.readouterr().err


def test_prompt_files_are_checked_line_by_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"turns": ["one", "two"]}\n\n{"prompt": "three"}\n{"question": "four"}\n')
    assert load_prompts(path) == [["one", "two"], ["three"], ["four"]]
    for text in ('{"turns": []}', "{", '{"answer": "x"}', ""):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="prompts.jsonl"):
            load_prompts(path)
