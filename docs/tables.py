"""The measurements in docs/results as Markdown tables; `figures.py` writes them into benchmarks.md."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).resolve().parent / "results"

Row = dict[str, Any]

_STOCK_RUN = ("via-sd-stock-spec-bench", "via-sd-stock-word-problems")
VIA_SD_RUN = ("via-sd-spec-bench", "via-sd-word-problems")
_VIA_SD_EXACT = "examples/adapters/via_sd@num_assistant_tokens=3,stage_len=2"
_VIA_SD_PAPER = "via_sd:paper@adapter=examples/adapters/via_sd,force=True,num_assistant_tokens=3"
OVERVIEW: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("stock, default cache", "", _STOCK_RUN, ("default",)),
    ("stock, static cache", "", _STOCK_RUN, ("static",)),
    ("stock prompt lookup", "", _STOCK_RUN, ("stock_prompt_lookup",)),
    ("stock assisted", "", _STOCK_RUN, ("stock_assisted",)),
    ("`plain`", "baselines.md", _STOCK_RUN, ("plain",)),
    ("`vegas`", "vegas.md", (), ("vegas",)),
    ("`prompt_lookup`", "baselines.md", _STOCK_RUN, ("prompt_lookup",)),
    ("`assisted`, 2 drafts", "drafts.md", _STOCK_RUN, ("assisted@num_assistant_tokens=2",)),
    (
        "`specbound`, trained heads",
        "specbound.md",
        ("specbound-spec-bench", "specbound-word-problems"),
        ("complete", "examples/adapters/specbound"),
    ),
    ("`via_sd`, exact", "via_sd.md", VIA_SD_RUN, (_VIA_SD_EXACT,)),
    ("*lossy:* `via_sd:paper`, forced", "via_sd.md", VIA_SD_RUN, (_VIA_SD_PAPER,)),
    ("`spd`, 5 processes on 2 cores", "spd.md", ("spd-wall-n5",), ("spd dist, 5 ranks",)),
)
"""Arms of the overview: label, page, files of Spec-Bench prompts and of word problems, names of the arm in them."""

_OLD = ("assisted-spec-bench", "assisted-word-math", "specbound-spec-bench", "specbound-word-problems")
_AGAIN = ("via-sd-spec-bench", "via-sd-word-problems")
_STOCK_PLAIN = ("default", "static")
_LABELS = {
    "default": "stock, default cache",
    "static": "stock, static cache",
    "plain": "`plain`",
    "prompt_lookup": "`prompt_lookup`",
    "vegas": "`vegas`",
    "vegas:window": "`vegas:window`",
    "plain@compile=inductor": '`plain`, `compile="inductor"`',
    "stock_prompt_lookup": "stock prompt lookup",
    "stock_assisted": "stock assisted",
    "stock_assisted@num_assistant_tokens=3,assistant_confidence_threshold=0.0": "stock assisted, 3 drafts",
    "stock_assisted@assistant_ensemble_weight=0.7": "*lossy:* stock, ensemble weight 0.7",
    "stock_early_exit@layer=2": "stock early exit after 2 layers",
    "complete": "`specbound`",
    "examples/adapters/specbound": "`specbound`",
    "without annealing": "`specbound` without annealing",
    "without depth bound": "`specbound` without depth bound",
    "without width bound": "`specbound` without width bound",
}
_VIA_SD = {
    "lossless_rule=gate": "`via_sd`, gate",
    "lossless_rule=prefilter": "`via_sd`, prefilter",
    "drafter=prompt_lookup": "`via_sd`, exact, prompt lookup drafts",
}


def load(name: str) -> Row:
    """Return the content of `docs/results/NAME.json`."""
    content: Row = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def measurements(name: str) -> list[Row]:
    """Return a file's arms, each with `arm` (as it is called today), `label`, `lossy`, `ratio` and `superseded`.

    `ratio` is tokens per second against the fastest stock plain setting of the same file, context and batch.
    """
    found = []
    for m in load(name)["measurements"]:
        arm = "stock_prompt_lookup" if name in _OLD and m["name"] == "prompt_lookup" else m["name"]
        again = name in _AGAIN and arm.partition("@")[0] in ("prompt_lookup", "stock_prompt_lookup", "stock_assisted")
        superseded = again or (name in _OLD and arm.startswith("stock_"))
        text = label(arm)
        found.append({**m, "arm": arm, "label": text, "lossy": text.startswith("*lossy"), "superseded": superseded})
    for m in found:
        if "tokens_per_second" in m:
            base = [o for o in found if o["name"] in _STOCK_PLAIN and o["batch"] == m["batch"]]
            m["ratio"] = m["tokens_per_second"] / max(o["tokens_per_second"] for o in base)
    return found


def long_contexts() -> list[Row]:
    """Return what was measured at 7 900 tokens of context, for all batches."""
    return [m for name in ("vegas-7900", "vegas-7900-batch8") for m in measurements(name)]


def overview_rows() -> list[Row]:
    """Return the arms of the overview, each with `label`, `page`, `arm`, `lossy`, and `ratios`.

    The ratios are of Spec-Bench prompts, of word problems, and of long contexts at batch 1, 4 and 8; `None` where
    nothing was measured.
    """
    found = []
    for text, page, files, names in OVERVIEW:
        short = []
        for name in files:
            rows = wall(5) if name == "spd-wall-n5" else measurements(name)
            short.append(next(m["ratio"] for m in rows if m["arm"] in names))
        long = {m["batch"]: m["ratio"] for m in long_contexts() if m["arm"] in names}
        ratios = [*(short + [None, None])[:2], *(long.get(batch) for batch in (1, 4, 8))]
        lossy = text.startswith("*lossy")
        found.append({"label": text, "page": page, "arm": names[0], "lossy": lossy, "ratios": ratios})
    return found


def overview(path: Path) -> str:
    """Return the overview as a table, for the README or a page in docs/ at `path`."""
    folder = "" if path.resolve().parent == RESULTS.parent else "docs/"
    headings = ("Spec-Bench prompts", "word problems", "7 900 tokens", "the same, batch 4", "batch 8")
    columns: dict[str, Callable[[Row], str]] = {
        "decoding": lambda m: f"[{m['label']}]({folder}{m['page']})" if m["page"] else m["label"]
    }
    for place, heading in enumerate(headings):
        columns[heading] = lambda m, place=place: number(m["ratios"][place], 2, "x")  # type: ignore[misc]
    return table(overview_rows(), columns)


def label(arm: str) -> str:
    """Return how tables call an arm of `hf-specdec bench` or `evaluate`."""
    if arm in _LABELS:
        return _LABELS[arm]
    strategy, _, settings = arm.partition("@")
    if strategy == "assisted":
        return f"`assisted`, {settings.partition('=')[2]} drafts"
    if strategy.startswith("via_sd:"):
        return f"*lossy:* `{strategy}`, forced"
    if strategy == "examples/adapters/via_sd":
        return next((text for part, text in _VIA_SD.items() if part in settings), "`via_sd`, exact")
    if strategy == "diversed":
        fields = dict(part.split("=") for part in settings.split(","))
        fields.pop("num_assistant_tokens")
        if "adapter" not in fields:
            return f"*lossy:* `diversed`, weight {fields['weight']}"
        offset = f", offset {float(fields['weight_offset']):g}" if "weight_offset" in fields else ""
        return f"*lossy:* `diversed`, trained head{offset}"
    raise ValueError(f"The arm {arm!r} has no label; give it one in docs/tables.py.")


def plain_label(text: str) -> str:
    """Return a label without Markdown, for plots."""
    return text.replace("`", "").replace("*", "")


def speed(name: str, batch: int | None = None) -> str:
    """Return the table of a file of `hf-specdec bench`, its command and its machine."""
    rows = [m for m in measurements(name) if batch in (None, m["batch"])]
    columns: dict[str, Callable[[Row], str]] = {
        "decoding": lambda m: m["label"] + (" †" if m["superseded"] else ""),
        "batch": lambda m: str(m["batch"]),
        "tokens/s": lambda m: f"{m['tokens_per_second']:.1f}",
        "ratio": lambda m: f"{m['ratio']:.2f}x",
        "tokens per step": lambda m: number(m.get("tokens_per_step"), 2),
        "accepted": lambda m: number(m.get("acceptance"), 2),
        "model calls per token": lambda m: number(m.get("forwards"), 2),
        "modelled vs plain": lambda m: number(m.get("modelled"), 2, "x"),
        "same text": lambda m: number(m.get("same_tokens"), 2),
    }
    if name.startswith("via-sd"):
        del columns["modelled vs plain"]  # a mean over prompts, which one text in a loop carries off
    if len({m["batch"] for m in rows}) == 1:
        del columns["batch"]
    return beside(name, table(rows, columns))


def task(name: str, timed: bool = True) -> str:
    """Return the table of a file of `hf-specdec evaluate`, its command and its machine."""
    columns: dict[str, Callable[[Row], str]] = {
        "decoding": lambda m: m["label"],
        "items": lambda m: str(m["items"]),
        "right": lambda m: f"{m['reward']:.3f}",
        "95 % interval": lambda m: f"{m['low']:.3f} to {m['high']:.3f}",
        # stock's speculative modes count nothing, and plain decoding drafts nothing
        "accepted": lambda m: number(m["acceptance"] or None, 2),
        "tokens per forward": lambda m: number(m["tokens_per_forward"] if m["acceptance"] else None, 2),
        "ms per token": lambda m: number(m["ms_per_token"] if timed else None, 1),
        "mean weight": lambda m: number(m["method"].get("mean_weight"), 2),
        "mean (1-w) TV": lambda m: number(m["method"].get("mean_bias"), 3),
    }
    return beside(name, table(measurements(name), columns))


def ticks() -> str:
    """Return SPD's ticks, for two and five stages."""
    files = ("spd-ticks-n2", "spd-ticks-n5")
    columns: dict[str, Callable[[Row], str]] = {
        "stages": lambda m: str(m["num_stages"]),
        "temperature": lambda m: f"{m['temperature']:g}",
        "accepted": lambda m: f"{m['acceptance']:.2f}",
        "tokens per tick": lambda m: f"{m['tokens_per_tick']:.2f}",
        "theoretical, mean of prompts": lambda m: f"{m['theoretical_mean']:.2f}x",
        "pooled": lambda m: f"{m['theoretical_pooled']:.2f}x",
    }
    rows = [m for name in files for m in load(name)["measurements"]]
    return "\n\n".join([table(rows, columns), *(source(name) for name in files)])


def wall(stages: int) -> list[Row]:
    """Return SPD's wall-clock arms with mean milliseconds per token, and the ratio to the fastest stock plain one."""
    times = {name: sum(values) / len(values) for name, values in load(f"spd-wall-n{stages}")["ms_per_token"].items()}
    base = min(times[name] for name in _STOCK_PLAIN)
    spoken = {"spd serial": "`spd`, one process", "spd threads": "`spd`, threads"}
    return [
        {
            "arm": name,
            "label": spoken.get(name) or (_LABELS[name] if name in _LABELS else f"`spd`, {name.split(', ')[1]}"),
            "ms": value,
            "ratio": base / value,
        }
        for name, value in times.items()
    ]


def wall_clock() -> str:
    """Return SPD's wall-clock, for two and five stages."""
    columns: dict[str, Callable[[Row], str]] = {
        "decoding": lambda m: m["label"],
        "ms per token": lambda m: f"{m['ms']:.0f}",
        "ratio": lambda m: f"{m['ratio']:.2f}x",
    }
    parts = []
    for stages in (2, 5):
        parts += [f"{stages} stages:", beside(f"spd-wall-n{stages}", table(wall(stages), columns))]
    return "\n\n".join(parts)


def table(rows: Sequence[Row], columns: dict[str, Callable[[Row], str]]) -> str:
    """Return a Markdown table; columns without any value are left out."""
    cells = {heading: [cell(row) for row in rows] for heading, cell in columns.items()}
    cells = {heading: values for heading, values in cells.items() if any(values)}
    lines = [f"| {' | '.join(cells)} |", f"| {' | '.join('---' for _ in cells)} |"]
    lines += [f"| {' | '.join(values)} |".replace("|  |", "| |") for values in zip(*cells.values(), strict=True)]
    return "\n".join(line.replace("|  |", "| |") for line in lines)


def beside(name: str, text: str) -> str:
    """Return a table with its file, command and machine below it."""
    return f"{text}\n\n{source(name)}"


def source(name: str) -> str:
    """Return where a file's figures come from: file, machine, versions and command."""
    content = load(name)
    found = content["environment"]
    machine = f"{found['device'].replace('(R)', '')}, {found['threads']} thread{'s' * (found['threads'] > 1)}"
    versions = f"torch {found['torch'].partition('+')[0]}, Transformers {found['transformers']}"
    command, _, then = content["command"].partition("; then ")
    lines = [" \\\n".join(_wrap(command)), *([f"# then {then}"] if then else [])]
    return "\n".join([f"[`{name}.json`](results/{name}.json), {machine}, {versions}:", "", "```bash", *lines, "```"])


def _wrap(command: str) -> list[str]:
    """Return the lines of a command; in double quotes a backslash at a line's end is nothing but a break."""
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": "    "}
    return textwrap.wrap(command.replace("'", '"'), width=108, **options)


def number(value: float | None, digits: int, unit: str = "") -> str:
    """Return a number as text, nothing for `None`."""
    return "" if value is None else f"{value:.{digits}f}{unit}"
