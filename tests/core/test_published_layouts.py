"""Small folders in the published layouts, written by the test, and what is read of them."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest

from qtt_core.errors import SpecError
from qtt_core.hub import load_hub
from qtt_core.layouts import EPOCHS
from qtt_core.learning import main, read_sources
from qtt_core.paper_layout import from_paper_folder
from qtt_core.prior import MetaPrior
from qtt_core.space import build_space
from qtt_core.tool_layout import from_tool_folder

HUB = load_hub("timm24")
V1 = build_space("quicktune-v1", HUB, max_fidelity=EPOCHS)
COMPAT = build_space("qtt-compat", HUB, max_fidelity=5)
CODES = ("BRD", "DOG", "PLK")
PLAIN_CONFIG = {"stoch_norm": False, "linear_probing": False, "model": "dla46x_c"}


def curve(config, shift, epochs=EPOCHS):
    """Rising percent; the better, the nearer the learning rate is to 1e-3."""
    top = 80 - 12 * abs(math.log10(float(config["lr"])) + 3) + shift
    return [round(top * (1 - 0.6**epoch), 3) for epoch in range(1, epochs + 1)]


# --- the paper's ---------------------------------------------------------------------------------


def arguments(config, dataset):
    """What the training script was told: with fillers, two spellings of None, betas as a list."""
    augmentation = config["data_augmentation"]
    betas = config.get("opt_betas")
    return {
        **{k: v for k, v in config.items() if k != "data_augmentation"},
        "auto_augment": config.get("auto_augment"),
        "random_augment": augmentation == "random_augment",
        "trivial_augment": augmentation == "trivial_augment",
        "ra_num_ops": config.get("ra_num_ops", 2), "ra_magnitude": config.get("ra_magnitude", 8),
        "opt_betas": None if betas is None else [float(b) for b in betas.strip("()").split(",")],
        "momentum": config.get("momentum", 0.9),
        "clip_grad": "None" if config["clip_grad"] == "none" else config["clip_grad"],
        "layer_decay": None if config["layer_decay"] == "none" else config["layer_decay"],
        "decay_rate": config.get("decay_rate", 0.1), "decay_epochs": config.get("decay_epochs", 90),
        "patience_epochs": config.get("patience_epochs", 10),
        "dataset": dataset, "num_classes": 20, "device": "cuda:0", "experiment": "x", "epochs": 50,
    }  # fmt: skip


class Paper:
    """The files of one version in memory; `write` puts them into a folder."""

    def __init__(self, runs=10):
        rng = np.random.default_rng(0)
        self.args, self.configs = {}, {}
        names = ("eval_top1", "train_time", "eval_time", "train_loss", "eval_loss")
        self.curves = {name: {} for name in names}
        for i, code in enumerate(CODES):
            dataset = f"mtlbm/micro/set0/{code}"
            for number, config in enumerate(V1.sample(runs, rng)):
                run = f"{number}{i}_micro_set0_{code}_v1"
                config = V1.canonical({**config, **PLAIN_CONFIG})
                self.configs[run] = config
                self.args[run] = arguments(config, dataset)
                told = (curve(config, i), [2.0] * 50, [0.5] * 50, [1.0] * 50, [1.0] * 50)
                for name, values in zip(names, told, strict=True):
                    self.curves[name].setdefault(dataset, {})[run] = list(values)

    def cut(self, run, length, **changed):
        """The run ended after so many epochs, and its arguments were these."""
        self.args[run].update(changed)
        for datasets in self.curves.values():
            for runs in datasets.values():
                if run in runs:
                    runs[run] = runs[run][:length]

    def write(self, root, version="micro"):
        folder = root / version
        folder.mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps(self.args))
        for name, content in self.curves.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        described = root / "dataset-meta-features" / "meta-album"
        described.mkdir(parents=True, exist_ok=True)
        features = {
            "dataset_names": [f"micro/set0/{code}" for code in CODES],
            "dataset_descriptors": [[480, 20, 128, 3], [456, 19, 128, 3], [480, 20, 128, 3]],
            "hessians": [[0.0] * 4] * 3,
        }
        (described / "meta-features.json").write_text(json.dumps(features))
        return folder


def row_of(meta, paper, run):
    """Position of a run by its configuration and data set."""
    found = [
        i for i, (c, d) in enumerate(zip(meta.configs, meta.datasets, strict=True))
        if c == paper.configs[run] and d == paper.args[run]["dataset"]
    ]  # fmt: skip
    return found[0] if found else None


def test_a_version_of_the_papers_meta_data_is_read_by_the_names_of_its_runs(tmp_path):
    paper = Paper()
    paper.args = dict(reversed(paper.args.items()))  # the order of a file says nothing
    meta = read_sources([paper.write(tmp_path)])

    assert meta.space.space_id == "quicktune-v1"
    assert meta.curves.shape == (30, 50)
    assert set(meta.states) == {"ok"}
    run = "31_micro_set0_DOG_v1"
    i = row_of(meta, paper, run)
    dog = "mtlbm/micro/set0/DOG"
    assert meta.datasets[i] == dog
    assert meta.curves[i] == pytest.approx(
        np.array(paper.curves["eval_top1"][dog][run]) / 100, abs=1e-6
    )
    assert meta.seconds[i, 0] == 2.5
    assert meta.metafeatures[dog] == {"n_train": 456.0, "num_classes": 19.0}
    assert "micro" in meta.source


@pytest.mark.parametrize(
    ("length", "nan", "changed", "state", "known"),
    [
        (12, None, {}, "censored", 12),
        (50, 7, {}, "diverged", 7),
        (1, 0, {}, "diverged", 0),
        (1, None, {"linear_probing": True}, None, 0),
        (40, None, {"linear_probing": True}, "censored", 25),
        (50, 25, {"linear_probing": True}, "censored", 25),
        (50, 30, {"linear_probing": True}, "censored", 25),
        (50, 10, {"linear_probing": True}, "diverged", 10),
        (50, None, {"linear_probing": True}, "ok", 50),
        (50, None, {"stoch_norm": True}, "ok", 50),
        (50, None, {"stoch_norm": True, "model": "mobilevit_xs"}, None, 0),
    ],
    ids=[
        "cut off", "loss becomes NaN", "NaN at once", "a dry run", "NaN was cut off",
        "NaN from the unfreezing on", "NaN soon after", "NaN long before", "came to the end",
        "stochastic norm", "without activations",
    ],
)  # fmt: skip
def test_what_the_old_harness_did_to_a_run_is_not_learned(
    tmp_path, length, nan, changed, state, known
):
    paper, run = Paper(runs=2), "10_micro_set0_BRD_v1"
    paper.cut(run, length, **changed)
    if nan is not None:
        losses = paper.curves["train_loss"]["mtlbm/micro/set0/BRD"][run]
        losses[nan:] = [math.nan] * (len(losses) - nan)
    paper.configs[run] = V1.canonical({**paper.configs[run], **changed})
    meta = from_paper_folder(paper.write(tmp_path))

    i = row_of(meta, paper, run)
    assert (i is None) == (state is None)
    if i is not None:
        assert meta.states[i] == state
        assert np.isfinite(meta.curves[i]).sum() == known


def test_seconds_of_a_node_without_accelerator_are_left_out_and_the_batch_is_what_ran(tmp_path):
    paper, run = Paper(runs=2), "10_micro_set0_BRD_v1"
    paper.args[run] |= {"device": "cpu", "final_batch_size": 8, "batch_size": 64}
    paper.configs[run] = V1.canonical({**paper.configs[run], "batch_size": 8})
    unknown = "00_micro_set0_BRD_v1"
    paper.args[unknown]["final_batch_size"] = -1

    meta = from_paper_folder(paper.write(tmp_path))

    assert np.isnan(meta.seconds[row_of(meta, paper, run)]).all()
    assert row_of(meta, paper, unknown) is not None
    assert np.isfinite(meta.seconds).any()


def test_scores_alone_are_enough(tmp_path):
    folder = Paper().write(tmp_path / "set")
    for path in folder.glob("*_[tl]*.json"):
        if path.name != "eval_top1.json":
            path.unlink()
    for path in (tmp_path / "set" / "dataset-meta-features").rglob("*.json"):
        path.unlink()

    meta = from_paper_folder(folder)

    assert np.isnan(meta.seconds).all()
    assert meta.metafeatures["mtlbm/micro/set0/DOG"] == {"num_classes": 20.0}


BRD = "mtlbm/micro/set0/BRD"
RUN = "00_micro_set0_BRD_v1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.args.pop(RUN), ["args.json", RUN, "missing"]),
        (lambda p: p.args[RUN].pop("lr"), ["args.json", f"{RUN}.lr", "missing"]),
        (lambda p: p.args[RUN].update(lr=0.3), ["args.json", f"{RUN}.lr", "0.3", "0.0001"]),
        (lambda p: p.args[RUN].update(model="vgg"), [f"{RUN}.model", "vgg", "beit_base"]),
        (lambda p: p.args[RUN].update(dataset="x"), [f"{RUN}.dataset", "'x'", "two versions"]),
        (
            lambda p: p.curves["eval_top1"][BRD][RUN].__setitem__(2, 130.0),
            ["eval_top1.json", RUN, "epoch 3", "130.0", "percent"],
        ),
        (
            lambda p: p.curves["eval_top1"][BRD][RUN].__setitem__(2, "high"),
            ["eval_top1.json", "epoch 3", "'high'", "is no number"],
        ),
        (
            lambda p: p.curves["train_time"][BRD][RUN].pop(),
            ["train_time.json", RUN, "49 epochs", "has 50"],
        ),
        (lambda p: p.curves["eval_top1"].__setitem__(BRD, [1]), ["eval_top1.json", BRD, "list"]),
    ],
)
def test_a_fault_of_the_papers_files_is_named(tmp_path, change, words):
    paper = Paper(runs=2)
    change(paper)
    with pytest.raises(SpecError) as caught:
        from_paper_folder(paper.write(tmp_path))
    for word in words:
        assert word in str(caught.value)


def test_the_folder_above_the_versions_says_which_there_are(tmp_path):
    paper = Paper(runs=1)
    paper.write(tmp_path, "micro")
    paper.write(tmp_path, "mini")
    with pytest.raises(SpecError, match="give one: micro, mini"):
        read_sources([tmp_path])


@pytest.mark.parametrize(("name", "words"), [("args.json", "no such file"), ("eval_top1.json", "")])
def test_a_broken_or_missing_file_is_named(tmp_path, name, words):
    folder = Paper(runs=1).write(tmp_path)
    if words:
        (folder / name).unlink()
    else:
        (folder / name).write_text("{")
    with pytest.raises(SpecError, match=words or "is no JSON") as caught:
        read_sources([folder])
    assert name in str(caught.value)


def test_a_prior_is_learned_of_the_papers_layout(tmp_path, capsys):
    folder = Paper(runs=12).write(tmp_path)

    code = main([str(folder), "--name", "micro2", "--to", str(tmp_path / "prior")])

    assert code == 0, capsys.readouterr().err
    prior = MetaPrior.load(tmp_path / "prior")
    configs = V1.sample(100, np.random.default_rng(3))
    good = np.array([abs(math.log10(float(c["lr"])) + 3) for c in configs]) < 0.5
    expected = prior.trend(configs, {"n_train": 480.0, "num_classes": 20.0})[:, -1]
    assert expected[good].mean() > expected[~good].mean()


# --- the tool's ----------------------------------------------------------------------------------


class Tool:
    """The tables in memory; `write` puts them into a folder."""

    def __init__(self, runs=6, tasks=3):
        rng = np.random.default_rng(1)
        self.config, self.curve, self.cost, self.meta, self.truth = {}, {}, {}, {}, {}
        for task in range(tasks):
            for number, sampled in enumerate(COMPAT.sample(runs, rng)):
                run = f"h{task}{number}"
                config = COMPAT.canonical({**sampled, **PLAIN_CONFIG})
                self.truth[run] = config
                self.config[run] = {name: config.get(name, "") for name in COMPAT.names}
                values = [v / 100 for v in curve(config, task, 5)]
                self.curve[run] = {str(n): v for n, v in enumerate(values, start=1)}
                self.cost[run] = {"cost": 10.0}
                self.meta[run] = {
                    "num-samples": 480 + 100 * task, "num-classes": 20, "num-features": 128,
                    "num-channels": 3,
                }  # fmt: skip

    def write(self, folder, config="config.csv"):
        folder.mkdir(parents=True, exist_ok=True)
        named = {
            config: self.config, "curve.csv": self.curve, "cost.csv": self.cost,
            "meta.csv": self.meta,
        }  # fmt: skip
        for name, table in named.items():
            if not table:
                continue
            with (folder / name).open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["", *next(iter(table.values()))])
                writer.writerows([run, *row.values()] for run, row in table.items())
        return folder


def test_the_tools_tables_are_read_in_its_space(tmp_path):
    tool = Tool()
    tool.curve["h03"] |= {"4": "", "5": "nan"}
    meta = read_sources([tool.write(tmp_path)])

    assert meta.space.space_id == "qtt-compat"
    assert meta.space.max_fidelity == 5
    assert meta.configs == tuple(tool.truth.values())
    assert meta.states.count("censored") == 1
    assert meta.states[3] == "censored"
    assert meta.curves[0] == pytest.approx(np.array([*tool.curve["h00"].values()]), abs=1e-6)
    assert meta.seconds[0, 0] == 2.0
    assert meta.seconds[3, 2] == pytest.approx(10 / 3)
    assert meta.tasks == tuple(f"n_train={n}, num_classes=20" for n in (480, 580, 680))
    assert meta.metafeatures[meta.tasks[1]] == {"n_train": 580.0, "num_classes": 20.0}
    assert "told apart by their descriptors" in meta.source


def test_zeros_that_stand_for_an_inactive_hyperparameter_are_none(tmp_path):
    tool = Tool()
    for row in tool.config.values():
        for name, value in row.items():
            row[name] = 0 if value == "" and name in {"patience_epochs", "decay_epochs"} else value

    assert from_tool_folder(tool.write(tmp_path)).configs == tuple(tool.truth.values())


@pytest.mark.parametrize("where", ["ds_to_idx.json", "config", "pipeline"])
def test_data_sets_of_equal_descriptors_are_told_apart_by_name(tmp_path, where):
    tool = Tool()
    for row in tool.meta.values():
        row["num-samples"] = 480
    if where == "ds_to_idx.json":
        groups = {f"d{t}": [run for run in tool.config if run[1] == str(t)] for t in range(3)}
        tmp_path.joinpath(where).write_text(json.dumps(groups))
    else:
        tool.config = {run: {"dataset": f"d{run[1]}", **row} for run, row in tool.config.items()}
        described = {"num-samples": 480, "num-classes": 20}
        tool.meta = {f"d{t}": described for t in range(3)}  # by data set, once each

    meta = from_tool_folder(tool.write(tmp_path, "pipeline.csv" if where == "pipeline" else CONFIG))

    assert meta.tasks == ("d0", "d1", "d2")
    assert meta.metafeatures["d1"]["n_train"] == 480.0


CONFIG = "config.csv"


def test_other_hyperparameters_are_read_as_they_are(tmp_path):
    tool = Tool()
    for i, row in enumerate(tool.config.values()):
        row.clear()
        row.update(model=f"net{i % 2}", depth=2 + i % 3, rate=10.0 ** -(i / 4), unused="")

    meta = from_tool_folder(tool.write(tmp_path))

    assert set(meta.space.names) == {"model", "depth", "rate"}
    assert meta.space.legal("model") == ("net0", "net1")
    assert meta.hub is None
    assert meta.configs[1]["rate"] == pytest.approx(10**-0.25)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.config.pop("h00"), ["config.csv: h00", "missing"]),
        (lambda t: t.config["h00"].update(lr=0.3), ["config.csv: h00.lr", "0.3", "0.0001"]),
        (
            lambda t: t.config["h00"].update(sched="step", decay_rate=""),
            ["h00.decay_rate", "active"],
        ),
        (lambda t: t.config["h00"].update(lr=""), ["h00.lr", "''"]),
        (lambda t: t.curve["h00"].update({"2": 37.5}), ["curve.csv: h00.2", "37.5", "[0, 1]"]),
        (lambda t: t.curve["h00"].update({"2": "high"}), ["h00.2", "'high'", "is no number"]),
        (lambda t: t.curve["h00"].update({"2": ""}), ["curve.csv: h00", "a gap", "at the end"]),
        (lambda t: t.cost["h00"].update(cost=-1), ["cost.csv: h00.cost", "-1", "seconds"]),
        (lambda t: t.meta.pop("h00"), ["meta.csv: h00", "missing", "dataset"]),
    ],
)  # fmt: skip
def test_a_fault_of_the_tools_tables_is_named(tmp_path, change, words):
    tool = Tool()
    change(tool)
    with pytest.raises(SpecError) as caught:
        from_tool_folder(tool.write(tmp_path))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "0 rows"),
        (",1\nh00,0.5\nh00,0.6\n", "is there twice"),
        (",1,2\nh00,0.5\n", "the header has 3 columns"),
        (None, "no such file"),
    ],
)
def test_a_broken_table_is_named(tmp_path, text, words):
    folder = Tool().write(tmp_path)
    (folder / "curve.csv").unlink()
    if text is not None:
        (folder / "curve.csv").write_text(text)
    with pytest.raises(SpecError, match=words) as caught:
        from_tool_folder(folder)
    assert "curve.csv" in str(caught.value)
