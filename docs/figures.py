"""Tables of benchmarks.md and plots in images/, from the measurements in results/.

    python docs/figures.py            # write all of them
    python docs/figures.py --tables   # the tables only; needs no matplotlib

Every ratio is to the fastest stock plain setting of the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tables
from generate import ROOT, replace_block
from tables import Row, measurements, plain_label


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "images"

TABLES: dict[str, Callable[[], str]] = {
    "vegas-table": lambda: join(tables.speed("vegas-7900"), tables.speed("vegas-7900-batch8")),
    "spec-bench-tables": lambda: join(
        tables.speed("via-sd-stock-spec-bench"),
        tables.speed("assisted-spec-bench"),
        tables.speed("assisted-spec-bench-batch4"),
        tables.speed("specbound-spec-bench"),
        tables.speed("via-sd-spec-bench"),
    ),
    "word-problem-tables": lambda: join(
        tables.speed("via-sd-stock-word-problems"),
        tables.speed("assisted-word-math"),
        tables.speed("specbound-word-problems"),
        tables.speed("via-sd-word-problems"),
    ),
    "via-sd-quality-tables": lambda: join(
        tables.task("via-sd-score", False), tables.task("via-sd-score-stock", False)
    ),
    "diversed-tables": lambda: join(tables.task("diversed-tasks"), tables.task("diversed-word-math")),
    "spd-tick-table": tables.ticks,
    "spd-wall-tables": tables.wall_clock,
    "inductor-tables": lambda: join(tables.speed("inductor-512-first"), tables.speed("inductor-512-again")),
}

COLOURS = {"stock": "#9aa1ab", "plain": "#6b8f9c", "ours": "#12756f", "lossy": "#c9822b", "theory": "#ffffff"}
RATIO = "tokens per second against the fastest stock plain decoding of the same run"
NAMES = {
    "stock": "stock Transformers",
    "plain": "plain: this package without drafts",
    "ours": "this package, lossless",
    "lossy": "lossy",
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_specdec",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "hatch.linewidth": 0.6,
}


def join(*parts: str) -> str:
    """Return parts of a page below one another."""
    return "\n\n".join(parts)


def page_with_tables(text: str) -> str:
    """Return the text of benchmarks.md with its tables written anew."""
    for name, write in TABLES.items():
        text = replace_block(text, name, write())
    return text


def kind(row: Row) -> str:
    """Return whose arm a row is: a key of `COLOURS`."""
    if row.get("lossy"):
        return "lossy"
    if row["arm"] in ("default", "static") or row["arm"].startswith("stock_"):
        return "stock"
    return "plain" if row["arm"] == "plain" else "ours"


def bars(ax: Axes, rows: Sequence[tuple[str, float | None, str]], title: str = "") -> None:
    """Draw horizontal bars of ratios, the first one on top, with a line at 1; for `None` it says "not measured"."""
    for y, (_, value, which) in enumerate(rows):
        if value is None:
            ax.text(0.02, y, "not measured", va="center", color="#5c636d", fontsize=8)
            continue
        hatch = "////" if which == "lossy" else None
        edge, line = (COLOURS["ours"], "--") if which == "theory" else ("white", "-")
        ax.barh(
            y, value, color=COLOURS[which], height=0.72, hatch=hatch, edgecolor=edge, linestyle=line, linewidth=0.7
        )
        ax.text(2, y, f"{value:.2f}x", va="center", ha="right", fontsize=8)
    ax.axvline(1, color="#1d2126", linewidth=1, zorder=3)
    ax.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, 2)
    ax.set_xticks((0, 0.5, 1, 1.5, 2), ("0", "0.5", "1", "1.5", "2"))
    ax.tick_params(axis="y", length=0)
    ax.set_title(title, loc="left", fontsize=9)


def legend(figure: Figure, kinds: Sequence[str], axis: str = RATIO) -> None:
    """Say below the axes what bars are long for, and what their colours mean."""
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=COLOURS[k], hatch="////" if k == "lossy" else None, edgecolor="white", label=NAMES[k])
        for k in kinds
    ]
    place: dict[str, Any] = {"loc": "outside lower left", "ncols": len(kinds), "alignment": "left"}
    figure.legend(handles=patches, title=f"Bars: {axis}", frameon=False, fontsize=8, title_fontsize=8, **place)


def arms(name: str) -> list[tuple[str, float | None, str]]:
    """Return a file's arms for `bars`, without the superseded ones."""
    return [(plain_label(m["label"]), m["ratio"], kind(m)) for m in measurements(name) if not m["superseded"]]


def draw_overview() -> Figure:
    """Draw the picture of the README: long contexts by batch, and short prompts by method."""
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(9.6, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=[3.4, 8.6])
    wanted = ("default", "plain", "vegas")
    for column, batch in enumerate((1, 4, 8)):
        ax = figure.add_subplot(grid[0, column])
        found = {m["arm"]: m for m in tables.long_contexts() if m["batch"] == batch}
        rows = [(plain_label(found[a]["label"]), found[a]["ratio"], kind(found[a])) for a in wanted]
        bars(ax, rows, f"7 900 tokens of context, batch {batch}")
        if column:
            ax.set_yticklabels([])
    lower = grid[1, :].subgridspec(1, 2)
    shown = [
        row for row in tables.overview_rows() if any(row["ratios"][:2]) and row["arm"] not in ("default", "static")
    ]
    for column, title in enumerate(("Spec-Bench prompts, batch 1", "One-step word problems, batch 1")):
        ax = figure.add_subplot(lower[0, column])
        bars(ax, [(plain_label(row["label"]), row["ratios"][column], kind(row)) for row in shown], title)
        if column:
            ax.set_yticklabels([])
    figure.suptitle("SmolLM2-135M-Instruct, bf16, two CPU cores", x=0.01, ha="left", fontsize=11)
    legend(figure, ("stock", "plain", "ours", "lossy"))
    return figure


def draw_runs(files: Sequence[tuple[str, str]]) -> Figure:
    """Draw every arm of several files, a panel for each."""
    from matplotlib import pyplot

    counts = [len(arms(name)) for name, _ in files]
    figure, axes = pyplot.subplots(
        len(files), 1, figsize=(8.2, 0.26 * sum(counts) + 0.55 * len(files) + 0.8), layout="constrained",
        height_ratios=[count + 0.3 for count in counts], sharex=True, squeeze=False,
    )  # fmt: skip
    for ax, (name, title) in zip(axes[:, 0], files, strict=True):
        bars(ax, arms(name), title)
    shown = {which for name, _ in files for _, _, which in arms(name)}
    legend(figure, [which for which in NAMES if which in shown])
    return figure


def draw_vegas() -> Figure:
    """Draw the ratios at 7 900 tokens by batch."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(9.2, 2.6), layout="constrained", sharey=True)
    for ax, batch in zip(axes, (1, 4, 8), strict=True):
        rows = [(plain_label(m["label"]), m["ratio"], kind(m)) for m in tables.long_contexts() if m["batch"] == batch]
        bars(ax, rows, f"batch {batch}")
    legend(figure, ("stock", "plain", "ours"))
    return figure


def draw_spd() -> Figure:
    """Draw what SPD's ticks would allow beside what was timed."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9.2, 3.0), layout="constrained")
    for ax, stages in zip(axes, (2, 5), strict=True):
        greedy = next(m for m in tables.load(f"spd-ticks-n{stages}")["measurements"] if m["temperature"] == 0)
        rows = [("theoretical: ticks only", greedy["theoretical_mean"], "theory")]
        rows += [(plain_label(m["label"]), m["ratio"], kind(m)) for m in tables.wall(stages)]
        bars(ax, rows, f"{stages} stages")
    legend(figure, ("stock", "plain", "ours"), RATIO.replace("tokens per second", "speed"))
    return figure


def draw_via_sd() -> Figure:
    """Draw VIA-SD's modes: speed on both kinds of prompts, and right answers of the lossy ones."""
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(9.2, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[8, 5])
    for column, (name, title) in enumerate(
        zip(tables.VIA_SD_RUN, ("Spec-Bench prompts", "Word problems"), strict=True)
    ):
        ax = figure.add_subplot(grid[0, column])
        bars(ax, [row for row in arms(name) if not row[0].startswith("stock, static")], title)
        if column:
            ax.set_yticklabels([])
    ax = figure.add_subplot(grid[1, :])
    scored = [m for name in ("via-sd-score", "via-sd-score-stock") for m in measurements(name)]
    intervals(ax, scored)
    ax.set_title("Word problems: share of right answers, 96 items, 95 % interval", loc="left", fontsize=9)
    legend(figure, ("stock", "plain", "ours", "lossy"))
    return figure


def intervals(ax: Axes, rows: Sequence[Row]) -> None:
    """Draw rewards with their intervals, the first one on top."""
    for y, m in enumerate(rows):
        colour = COLOURS[kind(m)]
        ax.plot([m["low"], m["high"]], [y, y], color=colour, linewidth=2)
        ax.plot(m["reward"], y, "o", color=colour)
    ax.set_yticks(range(len(rows)), [plain_label(m["label"]) for m in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, None)
    ax.tick_params(axis="y", length=0)


def draw_diversed() -> Figure:
    """Draw what DIVERSED's acceptance costs in right answers."""
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(7.6, 4.0), layout="constrained")
    rows = measurements("diversed-tasks")
    groups: dict[str, list[Row]] = {"lossless": [], "fixed weight": [], "trained head": []}
    for m in rows:
        group = "trained head" if "head" in m["label"] else "fixed weight" if m["lossy"] else "lossless"
        groups[group].append(m)
    colours = {"lossless": COLOURS["ours"], "fixed weight": COLOURS["lossy"], "trained head": "#7a4fa3"}
    for name, found in groups.items():
        x, y = [m["acceptance"] for m in found], [m["reward"] for m in found]
        spread: Any = [[m["reward"] - m["low"] for m in found], [m["high"] - m["reward"] for m in found]]
        line = "none" if name == "lossless" else "-"
        ax.errorbar(x, y, spread, fmt="o", linestyle=line, color=colours[name], capsize=2, linewidth=1, label=name)
        for m in found:
            text = plain_label(m["label"]).removeprefix("lossy: diversed, ").removeprefix("trained head, ")
            left = text.startswith(("assisted", "offset"))  # the right of these points is taken
            place, side = ((-6, -11), "right") if left else ((6, 5), "left")
            at = (m["acceptance"], m["reward"])
            ax.annotate(text, at, place, textcoords="offset points", ha=side, fontsize=8)
    ax.set_xlabel("share of drafts accepted")
    ax.set_ylabel("share of right answers")
    ax.set_xlim(-0.03, 0.85)
    ax.set_ylim(0, None)
    ax.legend(frameon=False, fontsize=8)
    return figure


_SPEC_BENCH = (
    ("via-sd-stock-spec-bench", "10 prompts, 64 new tokens (via-sd-stock-spec-bench.json)"),
    ("assisted-spec-bench", "12 prompts, 64 new tokens (assisted-spec-bench.json)"),
    ("assisted-spec-bench-batch4", "the same 12 prompts in batches of 4 (assisted-spec-bench-batch4.json)"),
    ("specbound-spec-bench", "10 prompts, 64 new tokens (specbound-spec-bench.json)"),
    ("via-sd-spec-bench", "10 prompts, 64 new tokens (via-sd-spec-bench.json)"),
)
_WORD_PROBLEMS = (
    ("via-sd-stock-word-problems", "8 items, 48 new tokens (via-sd-stock-word-problems.json)"),
    ("assisted-word-math", "10 items, 48 new tokens (assisted-word-math.json)"),
    ("specbound-word-problems", "8 items, 48 new tokens (specbound-word-problems.json)"),
    ("via-sd-word-problems", "8 items, 48 new tokens (via-sd-word-problems.json)"),
)
PLOTS: dict[str, Callable[[], Figure]] = {
    "benchmark": draw_overview,
    "vegas": draw_vegas,
    "spec-bench": lambda: draw_runs(_SPEC_BENCH),
    "word-problems": lambda: draw_runs(_WORD_PROBLEMS),
    "via-sd": draw_via_sd,
    "diversed": draw_diversed,
    "spd": draw_spd,
}


def write_plots(folder: Path, suffix: str = ".svg") -> None:
    """Write every plot into `folder`; the same measurements give the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, draw in PLOTS.items():
            figure = draw()
            about = {"Date": None, "Title": name} if suffix == ".svg" else None
            figure.savefig(folder / f"{name}{suffix}", metadata=about, dpi=110)
            pyplot.close(figure)


def main() -> None:
    """Write tables and plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="write the tables only")
    tables_only = parser.parse_args().tables
    PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    if not tables_only:
        write_plots(IMAGES)


if __name__ == "__main__":
    main()
