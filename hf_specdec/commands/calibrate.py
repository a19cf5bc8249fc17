"""The commands `hf-specdec calibrate ...`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..training.routing import MaskSearch
from .console import SMOLLM2, Target, bar, console, floats, load_model, new_table, numbers, read_prompts, write_json
from .options import expanded
from .train import finish, model_and_texts


if TYPE_CHECKING:
    from ..training.data import Text
    from ..training.scoring import SlimScorer

app = typer.Typer(help="Find settings that pay on this device.", no_args_is_help=True, add_completion=False)

Repeats = Annotated[int, typer.Option(help="Timed runs of each arm.")]
NewTokens = Annotated[int, typer.Option(help="Tokens decoded per row.")]
Data = Annotated[list[Path], typer.Option("--data", help="Text that the model wrote (`train text`).")]
Exclude = Annotated[list[Path] | None, typer.Option(help="JSONL of test prompts; text with one of them is dropped.")]
Save = Annotated[Path | None, typer.Option(help="Write the calibrated config into this folder; may be the adapter's.")]


@app.command("vegas")
@expanded
def calibrate_vegas_command(
    context: Annotated[str, typer.Option(help="Contexts to measure, separated by commas.")] = (
        "512,1024,2048,4096,7900"
    ),
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    new_tokens: NewTokens = 64,
    repeats: Repeats = 3,
    save: Save = None,
    target: Target = SMOLLM2,
) -> None:
    """Measure from which context Vegas pays on this device."""
    from ..bench.calibrate import calibrate_vegas
    from ..generation.methods.vegas import VegasConfig
    from ..texts import long_batch

    contexts = numbers(context, "--context")
    loaded, tokenizer = load_model(target)
    with bar("calibrating", len(contexts) * 2 * (repeats + 1)) as advance:
        options: dict[str, Any] = {"new_tokens": new_tokens, "repeats": repeats, "progress": advance}
        found, rows = calibrate_vegas(
            loaded, lambda length: long_batch(tokenizer, length, batch).to(loaded.device), contexts, **options
        )
    headings = ("context", "plain", "vegas", "gain", "tokens/step")
    table = new_table(f"batch {batch}: milliseconds per token", *headings)
    for plain, vegas in zip(rows[::2], rows[1::2], strict=True):
        one, other = plain.ms_per_token, vegas.ms_per_token
        steps = vegas.tokens_per_step or 1
        table.add_row(str(plain.context), f"{one:.1f}", f"{other:.1f}", f"{one / other:.2f}", f"{steps:.2f}")
    console.print(table)
    if found is None:
        console.print(
            f"Vegas did not pay at any measured context; leave it off, or set min_context above {contexts[-1]}."
        )
    else:
        console.print(f"min_context={found}")
    if save is not None:
        VegasConfig(min_context=found if found is not None else 2 * contexts[-1]).save_pretrained(save)
        console.print(f"saved to {save}")


@app.command("specbound")
@expanded
def calibrate_specbound_command(
    adapter: Annotated[str, typer.Option(help="Folder or Hub name of trained exit heads.")] = "",
    prompts: Annotated[Path | None, typer.Option(help="JSONL of prompts; the built-in text by default.")] = None,
    limit: Annotated[int, typer.Option(help="Prompts used, spread over the file.")] = 24,
    new_tokens: NewTokens = 64,
    repeats: Repeats = 3,
    save: Save = None,
    target: Target = SMOLLM2,
) -> None:
    """Find the settings of SpecBound that pay on this device."""
    import torch

    from ..bench.calibrate_specbound import WORTHWHILE, calibrate_specbound
    from ..generation.methods.specbound.method import SpecBoundConfig
    from ..generation.models.adapters import write_config
    from ..texts import chat_ids, long_prompt

    texts = read_prompts(prompts, limit)
    loaded, tokenizer = load_model(target)
    if texts:
        rows = [chat_ids(tokenizer, turns) for turns in texts]
    else:
        rows = [long_prompt(tokenizer, 256, offset) for offset in range(limit or 24)]
    with bar("calibrating", len(rows) + 2 * (repeats + 1)) as advance:
        options: dict[str, Any] = {"new_tokens": new_tokens, "repeats": repeats, "progress": advance}
        ids = [torch.tensor([row], device=loaded.device) for row in rows]
        config = SpecBoundConfig(adapter=adapter or None)
        chosen, predicted, costs = calibrate_specbound(loaded, config, ids, **options)
    console.print(
        f"layer {costs.layer[0]:.2f} ms (4 tokens {costs.layer[3]:.2f}), test {costs.test:.2f}, head "
        f"{costs.head[0]:.2f}, preparing a token {costs.token:.2f}, rest of a round {costs.round:.2f}, plain token "
        f"{costs.plain:.2f}"
    )
    console.print(
        f"alpha={chosen.alpha}, tau={chosen.tau}, exit_layers={chosen.exit_layers}, max_depth={chosen.max_depth}, "
        f"num_assistant_tokens={chosen.num_assistant_tokens}: predicted {predicted.speedup:.2f}x plain, "
        f"{predicted.tokens_per_round:.2f} tokens per round, {predicted.acceptance:.0%} accepted"
    )
    if predicted.speedup < WORTHWHILE:
        console.print(f"Below {WORTHWHILE}x: plain decoding is the better choice for this model and device.")
    if save is not None:
        write_config(save, chosen)
        finish(save, "saved")


@app.command("spd")
@expanded
def calibrate_spd_command(
    adapter: Annotated[str, typer.Option(help="Folder or Hub name of a trained draft module.")],
    prompts: Annotated[Path, typer.Option(help="JSONL of prompts.")],
    limit: Annotated[int, typer.Option(help="Prompts used, spread over the file; 0 for all.")] = 0,
    new_tokens: NewTokens = 128,
    temperatures: Annotated[str, typer.Option(help="Separated by commas; 0 is greedy.")] = "0,1",
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    target: Target = SMOLLM2,
) -> None:
    """Count the ticks that SPD takes on prompts, and the speed-up that they allow; nothing is timed."""
    import torch

    from ..bench.ticks import count_ticks
    from ..generation.methods.spd.method import SPDConfig
    from ..texts import chat_ids

    chosen = floats(temperatures, "--temperatures")
    texts = read_prompts(prompts, limit)
    loaded, tokenizer = load_model(target)
    rows = [torch.tensor([chat_ids(tokenizer, turns)], device=loaded.device) for turns in texts]
    config = SPDConfig(adapter=adapter, schedule="serial")
    with bar("counting", len(rows) * len(chosen)) as advance:
        options: dict[str, Any] = {"max_new_tokens": new_tokens, "seed": seed, "progress": advance}
        found = [count_ticks(loaded, rows, config, temperature=at, **options).figures() for at in chosen]
    title = f"{len(rows)} prompts, at most {new_tokens} new tokens; speed-up n N / K, nothing timed"
    headings = ("temperature", "n", "accepted", "after a rejection", "tokens/tick", "mean", "pooled")
    table = new_table(title, *headings)
    for row in found:
        cells = ("acceptance", "tokens_per_tick", "theoretical_mean", "theoretical_pooled")
        accepted, *others = (f"{row[name]:.2f}" for name in cells)
        first = f"{row['acceptance_per_fill'].get('1', 0):.2f}"
        table.add_row(f"{row['temperature']:g}", str(row["num_stages"]), accepted, first, *others)
    console.print(table)
    if json_out is not None:
        write_json(json_out, found)


@app.command("via_sd")
@expanded
def calibrate_via_sd_command(
    data: Data,
    save: Annotated[Path, typer.Option(help="Folder for the mask, and for what --resume goes on from.")],
    settings: MaskSearch,
    exclude: Exclude = None,
    texts: Annotated[int, typer.Option(help="Texts that score a mask; as many others are held out.")] = 24,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the search in the folder.")] = False,
    target: Target = SMOLLM2,
) -> None:
    """Search which layers VIA-SD's slim verifier can do without."""
    from dataclasses import asdict

    from ..generation.methods.via_sd.config import ViaSDConfig
    from ..generation.methods.via_sd.slim_model import Units, save_slim
    from ..training.scoring import SlimScorer

    loaded, found, notes = model_and_texts(data, exclude, target)
    chosen, cache = _spread(found, 2 * texts, settings.window), settings.slim_cache
    units = Units(loaded, settings.granularity)
    searched, held_out = (
        SlimScorer(loaded, part, units, settings.window, cache, (settings.alpha, settings.beta))
        for part in (chosen[::2], chosen[1::2])
    )
    keep = _searched(searched, settings, save, resume)
    figures = held_out.report(keep)
    calibration = {
        "objective": settings.objective, **figures, "skipped_share": units.share(keep), "slim_cache": cache,
        "even_mask": held_out.report(tuple(units.even(settings.skip_ratio, settings.skip_budget_by))),
        "search": {**asdict(settings), "texts": texts}, **notes,
    }  # fmt: skip
    config = ViaSDConfig(slim_cache=None if cache == "shared" else cache)
    save_slim(save, loaded, keep, settings.granularity, config=config, calibration=calibration)
    console.print(f"left out: {', '.join(units.names[unit] for unit in units.skipped(keep))}")
    console.print(_figures("searched mask", figures))
    console.print(_figures("evenly spaced", calibration["even_mask"]))
    finish(save, "saved")


def _searched(scorer: SlimScorer, settings: MaskSearch, folder: Path, resume: bool) -> tuple[bool, ...]:
    """Return the mask of a search, and show its progress."""
    from ..training.routing import search_mask

    with bar("searching", settings.max_steps) as advance:

        def report(state: dict[str, Any]) -> None:
            text = f"searching: best {settings.objective} {state['best']:.4f}, agreement {state['agreement']:.3f}"
            advance(0, completed=state["step"], description=text)

        return search_mask(scorer, settings, folder, resume=resume, report=report)


def _spread(texts: Sequence[Text], count: int, window: int) -> list[Text]:
    """Return `count` texts, spread over those whose answers have at least `window` tokens."""
    found = [text for text in texts if len(text.ids) - text.prompt_length >= window]
    if len(found) < count:
        raise ValueError(f"`--texts` takes {count} texts, but only {len(found)} have answers of {window} tokens.")
    return [found[i * len(found) // count] for i in range(count)]


def _figures(name: str, figures: dict[str, float]) -> str:
    return (
        f"{name}, held-out: agreement {figures['agreement']:.3f}, TV {figures['tv']:.3f}, KL {figures['kl']:.3f}, "
        f"margin cost {figures['margin']:.3f} ({figures['tokens']} tokens)"
    )


@app.command("via_sd_plan")
@expanded
def plan_via_sd_command(
    data: Data,
    adapter: Annotated[str, typer.Option(help="Folder or Hub name of a calibrated mask, perhaps with a LoRA.")],
    assistant: Annotated[str, typer.Option(help="Folder or Hub name of the drafter.")],
    exclude: Exclude = None,
    texts: Annotated[int, typer.Option(help="Texts to measure acceptance on.")] = 24,
    window: Annotated[int, typer.Option(help="Answer tokens read per text.")] = 64,
    sampling: Annotated[
        bool, typer.Option("--sampling", help="Rates at temperature 1 instead of greedy ones.")
    ] = False,
    layers: Annotated[float, typer.Option(help="Also plan for a target with so many parameters in its layers,")] = 0,
    head: Annotated[float, typer.Option(help="so many in its head,")] = 0,
    draft: Annotated[float, typer.Option(help="and a drafter of so many: costs by bytes, rates as measured.")] = 0,
    target: Target = SMOLLM2,
) -> None:
    """Measure costs and acceptance, and predict whether VIA-SD's third tier pays."""
    from ..bench.plan_via_sd import ViaSDPlanner, costs_by_bytes, measure_costs, measure_rates, read_parameters
    from ..generation.methods.via_sd.config import ViaSDConfig
    from ..generation.methods.via_sd.slim_model import Units, load_slim
    from ..training.scoring import SlimScorer

    if (layers > 0) != (head > 0) or (layers > 0) != (draft > 0):
        raise ValueError(f"`--layers`, `--head` and `--draft` go together, got {layers:g}, {head:g}, {draft:g}.")
    loaded, found, _ = model_and_texts(data, exclude, target)
    found = _spread(found, texts, window)
    second, slim = target.load_second(loaded, assistant), load_slim(loaded, adapter)
    units, mode = Units(loaded, slim.granularity), slim.cache_mode or "shared"
    scorer = SlimScorer(loaded, found, units, window, mode)
    rates = measure_rates(scorer, second, slim, ViaSDConfig().gate, sampling=sampling)
    costs = measure_costs(loaded, second, slim, found[0].ids[None].to(loaded.device))
    console.print(
        f"rates: a {rates.two_tier:.3f}, a1 {rates.inner:.3f}, a2 {rates.outer:.3f}, tiers A/B/C "
        f"{'/'.join(f'{share:.2f}' for share in rates.tiers)}, delta {rates.delta:.3f}"
    )
    title = "predicted speed-up over plain decoding (draft tokens; candidates per stage)"
    headings = ("costs", "draft", "slim of 1 and 6", "model of 6", "two-tier", "lossless", "lossy, safe")
    table = new_table(title, *headings)
    share = units.share(slim.keep)
    whole, top = read_parameters(loaded)
    small = sum(read_parameters(second))
    cases = {"measured here": costs, "by bytes": costs_by_bytes(whole, top, share, small)}
    if layers:
        cases["by bytes, as given"] = costs_by_bytes(layers, head, share, draft)
    for name, case in cases.items():
        plan = ViaSDPlanner(case, rates).plan()
        table.add_row(
            name, f"{case.draft:.3f}", f"{case.of(case.slim, 1):.2f} {case.of(case.slim, 6):.2f}",
            f"{case.of(case.full, 6):.2f}", f"{plan.two_tier:.2f} ({plan.two_tier_gamma})",
            f"{plan.lossless:.2f} ({plan.lossless_gamma}; {plan.stage_len})", f"{plan.lossy:.2f} ({plan.lossy_gamma})",
        )  # fmt: skip
        console.print(f"{name}: {plan.advice}")
    console.print(table)
