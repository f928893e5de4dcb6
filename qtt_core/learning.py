"""`python -m qtt_core.learning`: meta-training as a process of its own, started by `qtt metatrain`.

Sources in, a folder with prior, card and report out. Says its progress as JSON lines on standard
output, a mistake as one line on standard error; the only one of the command line to load torch.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qtt_core.errors import Fault, QuickTuneError, SpecError
from qtt_core.experience import from_ledgers
from qtt_core.layouts import from_runs_csv
from qtt_core.ledger.file import read_ledger
from qtt_core.long_format import KEYS, read_table
from qtt_core.metadataset import MANIFEST, MetaDataset
from qtt_core.metatrain import metatrain
from qtt_core.paper_layout import from_paper_folder, is_paper_layout
from qtt_core.prior import MetaPrior
from qtt_core.tool_layout import from_tool_folder, is_tool_layout

FEW_DATA_SETS = 8
LEDGERS = (".jsonl", ".ndjson")
USAGE = 64


def _is_saved(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


FOLDERS: Mapping[Callable[[Path], bool], Callable[[Path], MetaDataset]] = {
    _is_saved: MetaDataset.load,
    is_paper_layout: from_paper_folder,
    is_tool_layout: from_tool_folder,
}
"""How a folder of each kind is known, and how it is read."""


def read_sources(paths: Sequence[Path]) -> MetaDataset:
    """Ledger files (or a folder of them), or one table, or one folder of meta-data.

    Folders: of `MetaDataset.save`, or in a published layout (`paper_layout`, `tool_layout`).

    Raises: SpecError that says what can be read; OSError.
    """
    files = [file for path in paths for file in _files(path)]
    if files and all(file.suffix in LEDGERS for file in files):
        return from_ledgers([read_ledger(file) for file in files])
    if len(files) != 1:
        found = ", ".join(str(path) for path in paths)
        raise SpecError([Fault("SOURCE", found, "give ledger files, or one table or folder")])
    return _one(files[0])


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise SpecError([Fault("SOURCE", str(path), "no such file or folder")])
    if path.is_dir() and not any(is_one(path) for is_one in FOLDERS):
        inside = sorted(file for file in path.iterdir() if file.suffix in LEDGERS)
        if not inside:
            raise SpecError([Fault("SOURCE", str(path), _remedy(path))])
        return inside
    return [path]


def _remedy(path: Path) -> str:
    """What a folder that holds nothing to learn from should hold."""
    within = sorted(item.name for item in path.iterdir() if item.is_dir() and is_paper_layout(item))
    if within:
        return f"holds several versions of the paper's meta-data; give one: {', '.join(within)}"
    return (
        f"holds neither *.jsonl of `qtt ledger export` nor {MANIFEST}, nor a published layout: "
        "args.json and eval_top1.json, or config.csv and curve.csv"
    )


def _one(path: Path) -> MetaDataset:
    for is_one, read in FOLDERS.items():
        if path.is_dir() and is_one(path):
            return read(path)
    if path.suffix == ".parquet":
        return read_table(path)
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file), [])
    if set(KEYS) <= set(header):
        return read_table(path)
    return from_runs_csv(path)


def card_text(prior: MetaPrior) -> str:
    """The card as a page for people."""
    card, held_out = prior.card, prior.card["held_out"]
    few = len(card["tasks"]) < FEW_DATA_SETS
    caution = "Few data sets: what it says of new ones is uncertain.\n\n" if few else ""
    timed = "seconds" in prior.forests
    cost = "" if timed else "It has seen no seconds and says nothing of cost.\n\n"
    return (
        f"# Prior {prior.name}\n\n"
        f"{card['runs']} runs of {len(card['tasks'])} data sets, space `{prior.space.space_id}`, "
        f"{prior.space.max_fidelity} epochs. Source: {card['source'] or 'not named'}.\n\n"
        f"{caution}{cost}"
        "On data sets that its predictors did not see:\n\n"
        "| | |\n|---|---|\n"
        "| rank correlation of expected and true final score | "
        f"{_figure(held_out, 'spearman')} |\n"
        f"| mean error of the final score | {_figure(held_out, 'mean_error')} |\n"
        f"| final scores inside the 80 % interval | {_figure(held_out, 'coverage')} |\n"
        f"| median error of seconds | {_figure(held_out, 'median_error')} |\n\n"
        f"Data sets: {', '.join(card['tasks'])}.\n\n"
        f"Made by version {card['version']}, seed {card['seed']}, of data {card['data'][:16]}.\n"
    )


def _figure(held_out: Mapping[str, Any], prefix: str) -> str:
    value = next((v for name, v in held_out.items() if name.startswith(prefix)), None)
    return "not known: too few runs" if value is None else f"{value:.3f}"


def draw(prior: MetaPrior, meta: MetaDataset, path: Path) -> bool:
    """Expected against true final scores of the runs it learned from; False without matplotlib."""
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return False
    from qtt_core.surrogate import squash_of

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    for task in meta.tasks:
        mine = meta.of_tasks([task])
        features = mine.metafeatures[task]
        expected = squash_of(features).to_score(prior.trend(mine.configs, features)[:, -1])
        axes.plot(expected, mine.curves[:, -1], ".", label=task[:24])
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    axes.set(
        xlabel="expected final score", ylabel="final score", aspect="equal",
        title=f"prior {prior.name}: the runs it was learned from",
    )  # fmt: skip
    if len(meta.tasks) <= FEW_DATA_SETS:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Learn, save, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--to", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    try:
        meta = read_sources(asked.sources)
        prior = metatrain(meta, asked.seed, name=asked.name, progress=_say)
        prior.save(asked.to)
    except (QuickTuneError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return USAGE
    _say("saved", 1.0)
    text = card_text(prior)
    (asked.to / "README.md").write_text(text, encoding="utf-8")
    drawn = draw(prior, meta, asked.to / "expected.png")
    if not drawn:
        text += "\nNo picture: pip install 'quicktune-operator[meta]' brings matplotlib.\n"
    _tell({"report": text})
    return 0


def _say(doing: str, share: float) -> None:
    _tell({"doing": doing, "share": share})


def _tell(what: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
