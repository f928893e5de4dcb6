"""From ledgers and tables to a prior, through the process that `qtt metatrain` starts."""

import csv
import importlib.util
import json
import math

import numpy as np
import pytest
from ConfigSpace import Categorical, ConfigurationSpace, Float

from qtt_core.errors import NewerSchemaError, SpecError
from qtt_core.experience import from_ledgers
from qtt_core.hub import load_hub
from qtt_core.learning import card_text, main, read_sources
from qtt_core.ledger.events import Done, Fail, Open, Prepared, Run
from qtt_core.ledger.file import Ledger, parse_ledger, read_ledger
from qtt_core.long_format import KNOWN, read_table
from qtt_core.metadataset import MetaDataset
from qtt_core.metatrain import metatrain
from qtt_core.prior import MetaPrior
from qtt_core.space import SearchSpace, build_space

T = 4
SPACE = build_space("native", load_hub("tiny"), max_fidelity=T)


def ledger(number, runs=12, *, seed=0, fidelity=T, fingerprint=None):
    """A run of so many configurations; some diverge, run out of memory or are cut off."""
    rng = np.random.default_rng([seed, number])
    spec = {
        "search": {"space": "native", "hub": "tiny"}, "fidelity": {"max": fidelity, "step": 1},
        "dataset": {"claimName": "images"},
    }  # fmt: skip
    events = [
        Run(
            id="1-0", name=f"run{number}", spec_hash="", seed=0, algorithm="QuickTune",
            version="0", space_hash="", spec=spec,
        ),
        Prepared(
            id="2-0", fingerprint=fingerprint or f"{number}" * 64, n_train=900 + number, n_val=90,
            classes=5, metafeatures={"median_side": 28.0},
        ),
    ]  # fmt: skip
    configs = {str(i): config for i, config in enumerate(SPACE.sample(runs, rng))}
    for i, (c, config) in enumerate(configs.items()):
        end = [fidelity, 2, fidelity, 1][i % 4] if i < 4 else fidelity
        opened = Open(id=f"{10 + 2 * i}-0", c=c, frm=0, to=end, h="", res=1.0)
        events.append(opened)
        if i == 2:
            events.append(Fail(id=f"{11 + 2 * i}-0", c=c, to=end, a=0, state="oom", dev=1.0))
            continue
        score = 0.9 - 0.1 * abs(math.log10(float(config["lr"])) + 3) + 0.02 * rng.normal()
        epochs = tuple((e, min(0.99, max(0.01, score - 0.3 / e)), 0.5) for e in range(1, end + 1))
        state = "diverged" if i == 1 else "ok"
        told = epochs[:1] if i == 1 else epochs
        events.append(
            Done(id=f"{11 + 2 * i}-0", c=c, to=end, a=0, state=state, epochs=told, dev=1.0)
        )
    return Ledger(name=f"run{number}", uid=f"u{number}", configs=configs, events=events)


def write(folder, *ledgers):
    for one in ledgers:
        (folder / f"{one.name}.jsonl").write_text("\n".join(one.lines()) + "\n")
    return folder


# --- ledgers -------------------------------------------------------------------------------------


def test_a_ledger_file_is_the_ledger(tmp_path):
    one = ledger(1)
    write(tmp_path, one)
    assert read_ledger(tmp_path / "run1.jsonl") == one


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda lines: lines.clear(), SpecError, "empty"),
        (lambda lines: lines.pop(0), SpecError, "no header"),
        (lambda lines: lines.insert(3, "{broken"), SpecError, "x:4"),
        (
            lambda lines: lines.__setitem__(0, lines[0].replace('"schema": 1', '"schema": 99')),
            NewerSchemaError, "99",
        ),
    ],
    ids=["empty", "no header", "a broken line", "a newer schema"],
)  # fmt: skip
def test_a_damaged_ledger_file_names_the_line(change, error, words):
    lines = ledger(1).lines()
    change(lines)
    with pytest.raises(error, match=words):
        parse_ledger(lines, "x")


def test_runs_become_rows_that_keep_how_they_ended():
    meta = from_ledgers([ledger(1), ledger(2), ledger(3, fingerprint="1" * 64)])

    assert len(meta.tasks) == 2  # the third run read the first one's images
    assert meta.states[:5] == ("ok", "diverged", "failed", "censored", "ok")
    assert np.isfinite(meta.curves[0]).all()
    assert np.isnan(meta.curves[3, 1:]).all()
    assert meta.metafeatures[meta.tasks[1]]["n_train"] == 902
    assert meta.seconds[0, 0] == np.float32(0.5)


def test_runs_of_another_fidelity_are_learned_apart():
    with pytest.raises(SpecError, match=r"run2: native, 3 epochs.*one fidelity"):
        from_ledgers([ledger(1), ledger(2, fidelity=3)])


# --- the whole way -------------------------------------------------------------------------------


def test_a_folder_of_ledgers_becomes_a_prior_with_card_and_progress(tmp_path, capsys):
    write(tmp_path, *(ledger(number) for number in range(3)))

    code = main([str(tmp_path), "--name", "mine", "--to", str(tmp_path / "prior")])

    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    shares = [line["share"] for line in said if "share" in line]
    assert code == 0
    assert shares == sorted(shares)
    assert len(shares) > 5
    prior = MetaPrior.load(tmp_path / "prior")
    assert prior.name == "mine"
    card = (tmp_path / "prior" / "README.md").read_text()
    assert card in said[-1]["report"]
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "prior" / "expected.png").exists() == drawn
    assert ("No picture" in said[-1]["report"]) != drawn
    for words in (
        "rank correlation",
        "80 % interval",
        "seconds",
        "Few data sets",
        "images-0000",
        "images-1111",
    ):
        assert words in card


@pytest.mark.parametrize(
    ("ledgers", "words"),
    [([ledger(1)], "1 data sets with finished runs"), ([], "neither")],
    ids=["one data set", "nothing"],
)
def test_what_cannot_be_learned_from_is_said_in_one_line(tmp_path, capsys, ledgers, words):
    code = main([str(write(tmp_path, *ledgers)), "--name", "mine", "--to", str(tmp_path / "p")])
    assert code == 64
    assert words in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_mixed_sources_are_refused(tmp_path):
    write(tmp_path, ledger(1))
    (tmp_path / "table.csv").write_text("dataset,run,epoch,score\n")
    with pytest.raises(SpecError, match="one table"):
        read_sources([tmp_path / "run1.jsonl", tmp_path / "table.csv"])


def test_meta_data_without_seconds_say_nothing_of_cost():
    cs = ConfigurationSpace()
    cs.add(Float("lr", (1e-5, 1e-1), log=True), Categorical("opt", ["a", "b"]))
    space = SearchSpace.from_configspace(cs, max_fidelity=3)
    rng = np.random.default_rng(0)
    configs = space.sample(30, rng)
    curves = [
        np.clip(0.5 + 0.1 * math.log10(c["lr"]) + np.arange(1, 4) / 10, 0, 1) for c in configs
    ]
    names = [f"d{i % 3}" for i in range(30)]
    meta = MetaDataset.from_records(space, configs, curves, [[]] * 30, names)

    prior = metatrain(meta, 0)

    assert "seconds" not in prior.forests
    assert np.isfinite(prior.trend(configs, {})).all()
    assert "says nothing of cost" in card_text(prior)


# --- tables --------------------------------------------------------------------------------------


def table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*KNOWN[:5], "meta:n_train", "lr", "depth", "opt"])
        writer.writerows(rows)
    return path


def test_a_table_of_epochs_is_read_with_a_space_made_of_its_values(tmp_path):
    rows = [
        (f"d{run % 2}", f"r{run}", epoch, "" if (run, epoch) == (3, 2) else 0.1 * epoch, 1.5,
         500, 10 ** (-run / 4), 2 + run % 2, "" if run == 1 else "sgd")
        for run in range(16)
        for epoch in range(1, 3 if run == 3 else (2 if run == 5 else 4))
    ]  # fmt: skip
    meta = read_table(table(tmp_path / "t.csv", rows))

    assert meta.space.max_fidelity == 3
    assert meta.space.legal("lr") is None
    assert meta.space.legal("depth") == (2.0, 3.0)
    assert meta.states[3] == "diverged"
    assert meta.states[5] == "censored"
    assert meta.metafeatures["d0"] == {"n_train": 500.0}
    assert read_sources([tmp_path / "t.csv"]).sha == meta.sha


def test_the_values_at_the_ends_of_a_range_are_inside_it(tmp_path):
    """As logs have them, with all their digits; bounds were rounded past them."""
    rates = [*10 ** np.random.default_rng(7).uniform(-7, -1, 40), -0.123456789012345, 1 / 3]
    rows = [("d", f"r{i}", 1, 0.5, 1.0, 5, repr(float(x)), 2, "sgd") for i, x in enumerate(rates)]

    meta = read_table(table(tmp_path / "t.csv", rows))

    assert [config["lr"] for config in meta.configs] == pytest.approx(rates, rel=1e-12)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_is_the_same_as_csv_and_as_parquet(tmp_path, kind):
    rows = [
        {
            "dataset": f"d{run % 2}", "run": f"r{run}", "epoch": epoch,
            "score": None if run == 3 and epoch > 1 else epoch / 10, "seconds": 1.5,
            "meta:n_train": 500, "lr": 10.0 ** (-run / 4), "depth": 2 + run % 3,
            "amp": run % 2 == 0,
        }
        for run in range(16)
        for epoch in (1, 2, 3)
    ]  # fmt: skip
    path = tmp_path / f"t.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        arrow = pytest.importorskip("pyarrow", reason="of the extra [meta], which CI lacks")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), path)

    meta = read_sources([path])

    assert meta.states[3] == "diverged"
    assert meta.curves[0] == pytest.approx(np.array([0.1, 0.2, 0.3]))
    assert meta.configs[5] == {"lr": pytest.approx(10**-1.25), "depth": 4.0, "amp": "False"}
    assert meta.metafeatures["d1"] == {"n_train": 500.0}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("d", "r", 2, 0.1, 1, 5, 0.1, 2, "sgd")], "epochs 1, 2"),
        ([("d", "r", 1, "high", 1, 5, 0.1, 2, "sgd")], "is no number"),
        ([("d", "r", 1, 50, 1, 5, 0.1, 2, "sgd")], "scale scores"),
        ([], "no column"),
    ],
)
def test_a_bad_table_is_told_what_is_wrong(tmp_path, rows, words):
    with pytest.raises(SpecError, match=words):
        read_table(table(tmp_path / "t.csv", rows))
