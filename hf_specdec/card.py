"""The card of saved settings: `README.md` with front matter for the Hub, and a part that is generated.

A card that somebody wrote keeps its text. Front-matter keys that it lacks are added, and the part between the two
markers is written anew; a card without markers has no such part.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import jinja2
import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

from . import artefacts
from .artefacts import AdapterReference
from .registry import strategy_class


BEGIN, END = "<!-- hf_specdec:begin -->", "<!-- hf_specdec:end -->"
"""Markers around what is generated."""

_TEMPLATES = Path(__file__).parent / "templates"
_NAME = "README.md"
_KINDS = {
    "draft": "A draft model that was cut out of the base model: its own layers and norm. Embedding and head are the "
    "base model's and are not in the file.",
    "exit_heads": "Trained exit heads: what the base model will say, guessed after a part of its layers.",
    "slim": "A mask of layers that the base model can do without when it pre-judges drafts, and where one was trained "
    "a LoRA for the layers that stay.",
    "diversed_head": "A trained head that weighs the draft's distribution against the base model's at each position.",
    "draft_module": "A trained draft module for pipelined decoding.",
}
_MODELS = ("model", "target", "target_model")
_TRAINING = ("training", "train")
_NOT_SETTINGS = ("adapter", "strategy", "hf_specdec_version")
_NOTES = ("command", "data", "excluded")
_MEASURED = ("held_out", "calibration")


class ResultTable(NamedTuple):
    """The ways of decoding that were compared in one run.

    Attributes:
        title (`str`): context, batch and new tokens.
        base (`str`): name of the row that the ratios refer to.
        rows (`list[tuple]`): per row name, tokens per second, ratio, tokens per step, share of accepted drafts.
    """

    title: str
    base: str
    rows: Sequence[tuple[str, float, float, float | None, float | None]]


class Results(NamedTuple):
    """Measurements for a card: the command that made them, versions and device, a table per length and batch size."""

    command: str
    environment: dict[str, Any]
    tables: Sequence[ResultTable]


class Settings(Protocol):
    """What a card and an upload read of a `SpeculationConfig`."""

    strategy: ClassVar[str]

    @property
    def lossless(self) -> bool:
        """Whether the output's distribution is the model's own."""

    @property
    def brings_drafter(self) -> bool:
        """Whether the settings name what drafts."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the settings, the adapter that they name, and a card."""


def write_card(
    folder: str | Path, config: Settings, repo_id: str | None = None, results: Results | None = None
) -> None:
    """Write the card of the settings in `folder`, or complete the one that is there.

    Args:
        folder (`str` or `Path`): with saved settings.
        config (`SpeculationConfig`): these settings.
        repo_id (`str`, *optional*): where they will be found; the card names the folder otherwise.
        results (`Results`, *optional*): measurements to show.

    Raises:
        ValueError: for a card whose front matter or markers can't be read, or `results` for one without markers.
    """
    path = Path(folder)
    file = path / _NAME
    data, card = _render(path, config, repo_id, results)
    if not file.exists():
        file.write_text(card, encoding="utf-8", newline="\n")
        return
    text = file.read_bytes().decode("utf-8")
    begins, ends = text.count(BEGIN), text.count(END)
    if results is not None and not begins:
        raise ValueError(
            f"{str(file)!r} has no place for results. Put the lines {BEGIN} and {END} where they should be, or leave "
            "the results out."
        )
    if (begins, ends) not in ((0, 0), (1, 1)) or text.find(BEGIN) > text.find(END):
        raise ValueError(f"{str(file)!r} must hold {BEGIN} and then {END}, once each, or neither.")
    if begins:
        generated = card[card.index(BEGIN) : card.index(END)]
        text = text[: text.index(BEGIN)] + generated + text[text.index(END) :]
    file.write_bytes(_completed(text, data, str(file)).encode("utf-8"))


def _completed(text: str, data: ModelCardData, where: str) -> str:
    """Return a card with the front-matter keys that it lacks; every line that it has stays as it is."""
    found = REGEX_YAML_BLOCK.search(text)
    if found is None:
        return f"---\n{data.to_yaml()}\n---\n\n{text}"
    try:
        known = yaml.safe_load(found[2]) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"The front matter of {where!r} is not YAML: {error}.") from error
    if not isinstance(known, dict):
        raise ValueError(f"The front matter of {where!r} must hold keys and values, got {type(known).__name__}.")
    missing = {key: value for key, value in data.to_dict().items() if key not in known}
    if not missing:
        return text
    newline = "\r\n" if "\r\n" in found[1] else "\n"
    added = yaml_dump(missing, sort_keys=False).rstrip("\n").replace("\n", newline)
    end = found.end(2)
    return f"{text[:end]}{newline}{added}{text[end:]}"


def render(name: str, config: Settings, **values: Any) -> str:
    """Return a template of the package, filled with what there is to say of a config's strategy, and with `values`."""
    cls = strategy_class(config.strategy)
    text = (_TEMPLATES / name).read_text(encoding="utf-8")
    template = jinja2.Template(text, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    return template.render(
        strategy=config.strategy,
        about=(inspect.getdoc(cls) or "").partition("\n")[0],
        paper=cls.paper,
        lossless=config.lossless,
        in_turn=not cls.batched,
        assistant=cls.needs_assistant and not config.brings_drafter,
        **values,
    )


def _render(folder: Path, config: Settings, repo_id: str | None, results: Results | None) -> tuple[ModelCardData, str]:
    """Return front matter and text of a new card."""
    values = artefacts.read_values(folder)
    adapter = AdapterReference.parse(values, folder)
    record = {} if adapter is None else adapter.record
    base = next((record[name].get("name") for name in _MODELS if isinstance(record.get(name), dict)), None)
    on_hub = str(base).count("/") == 1  # else it is the name of the folder that it was read from
    data = ModelCardData(
        library_name="hf_specdec",
        base_model=base if on_hub else None,
        pipeline_tag="text-generation",
        tags=["speculative-decoding", "hf_specdec", config.strategy],
    )
    calibration = record.get("calibration", {})  # a search for a mask notes there what it read
    learned = {
        **{name: calibration[name] for name in _NOTES if name in calibration},
        **record,
        **record.get("lora", {}),
    }
    training = next((dict(learned[name]) for name in _TRAINING if isinstance(learned.get(name), dict)), {})
    measured = {name: learned.get(name, training.pop(name, None)) for name in _MEASURED}
    text = render(
        "model_card.md",
        config,
        front=data.to_yaml(),
        begin=BEGIN,
        end=END,
        base=base,
        model=base if on_hub else None,
        what=_KINDS.get(record.get("kind", ""), f"An adapter of kind {record.get('kind')}.") if record else None,
        place=repo_id or folder.name,
        pushed=repo_id is not None,
        settings=_rows({key: value for key, value in values.items() if key not in _NOT_SETTINGS}),
        training=_rows(training),
        data=learned.get("data", []),
        excluded=learned.get("excluded", []),
        command=learned.get("command"),
        measured=[
            (key, _rows({name: figure for name, figure in value.items() if name not in (*_NOTES, "search")}))
            for key, value in measured.items()
            if isinstance(value, dict)
        ],
        results=results,
        versions={name: version(name) for name in ("hf_specdec", "transformers", "torch")},
        made_with=values.get("hf_specdec_version"),
    )
    return data, text


def _rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Return names and values of nested settings or figures, flat; long lists and what is unset are left out."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += [(f"{name} / {inner}", text) for inner, text in _rows(value)]
        elif value is not None and not (isinstance(value, list) and len(value) > 16):
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            rows.append((name, text.replace("|", "\\|")))
    return rows
