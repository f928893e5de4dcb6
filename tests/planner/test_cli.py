"""The command line: what it prints, how it exits, what it says to a mistake."""

import csv
import io
import json
import resource
import subprocess
import sys

import pytest
import yaml

from qtt_core import errors
from qtt_operator import cli
from qtt_operator.exits import MEANINGS, exit_code
from qtt_operator.output import Column, render

VERBS = ("run", "lint", "leaderboard", "statistics", "logs", "get", "watch", "ledger")


@pytest.fixture
def qtt(capsys, recorded):
    """Run a verb on the recorded run: (exit code, output, errors)."""

    def run(verb, *words):
        try:
            code = cli.main([verb, *map(str, words), "--state-dir", str(recorded.state_dir)])
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


# --- help ---------------------------------------------------------------------------------------


def test_help_names_every_verb_and_every_exit_code(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])

    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f"    {verb}" in text for verb in VERBS)
    assert all(f"  {code:>2}  {meaning}" in text for code, meaning in MEANINGS.items())


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])

    assert ended.value.code == 0
    assert "usage: qtt " + verb in capsys.readouterr().out


def test_help_loads_nothing_heavy_and_takes_a_fifth_of_a_second():
    """CPU seconds, of which others on the machine take none; the smallest of five."""
    code = "import sys, qtt_operator.cli as c; c.build_parser(); print(*sorted(sys.modules))"
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    heavy = {"numpy", "yaml", "redis", "rich", "torch", "ConfigSpace", "asyncio"}
    assert not heavy & set(done.stdout.split())
    assert min(seconds) < 0.2


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["bogus"],
        ["leaderboard"],
        ["leaderboard", "rec", "-o", "xml"],
        ["leaderboard", "rec", "--top", "0"],
        ["run", "--nope", "f"],
    ],
)
def test_a_usage_error_exits_64_and_shows_the_usage(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)

    assert ended.value.code == 64
    assert "usage: qtt" in capsys.readouterr().err


# --- exit codes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.SpecError([]), 64),
        (errors.SpecDriftError(["spec.search"], "undo it"), 64),
        (errors.UnknownConfigurationError("c9"), 64),
        (errors.DataError("no images"), 65),
        (errors.StoreUnavailableError("refused"), 69),
        (errors.StoreError("damaged"), 69),
        (errors.LedgerError("contradiction"), 70),
        (errors.OptimizerError("died"), 70),
        (ValueError("a bug"), 70),
        (errors.VolumeError("full"), 74),
        (OSError(28, "No space left on device"), 74),
        (errors.RunLockedError("busy"), 75),
        (errors.StaleEpochError("taken over"), 75),
        (KeyboardInterrupt(), 75),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_every_error_has_its_exit_code(error, code):
    assert exit_code(error) == code


def fail_with(monkeypatch, error):
    def handler(_arguments):
        raise error

    monkeypatch.setattr(cli, "_handler", lambda _path: handler)


def test_a_users_mistake_is_one_line_without_a_traceback(monkeypatch, capsys):
    fail_with(monkeypatch, errors.DataError("train holds one class; use at least two"))

    code = cli.main(["get", "rec"])

    assert code == 65
    assert capsys.readouterr().err == "qtt: train holds one class; use at least two\n"


def test_all_faults_of_a_manifest_are_listed(monkeypatch, capsys):
    faults = [errors.Fault("spec.a", 1, "use 2"), errors.Fault("spec.b", 3, "use 4")]
    fail_with(monkeypatch, errors.SpecError(faults))

    assert cli.main(["get", "rec"]) == 64
    assert capsys.readouterr().err == "qtt: 2 faults\n  spec.a: 1; use 2\n  spec.b: 3; use 4\n"


def test_a_bug_is_one_line_and_its_traceback_is_kept_in_a_file(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(cli.tempfile, "tempdir", None)
    fail_with(monkeypatch, ZeroDivisionError("division by zero"))

    code = cli.main(["get", "rec"])

    said = capsys.readouterr().err
    (kept,) = tmp_path.glob("qtt-traceback-*.txt")
    assert (code, said.count("\n")) == (70, 1)
    assert str(kept) in said
    assert "Traceback" not in said
    assert "Traceback" in kept.read_text()


def test_debug_shows_the_traceback(monkeypatch, capsys):
    fail_with(monkeypatch, ZeroDivisionError("division by zero"))

    assert cli.main(["get", "rec", "--debug"]) == 70
    assert "Traceback" in capsys.readouterr().err


# --- reading verbs --------------------------------------------------------------------------------


def test_leaderboard_ranks_kept_checkpoints_and_marks_the_recommended_one(qtt):
    code, out, err = qtt("leaderboard", "rec")

    rows = [line.split() for line in out.splitlines() if "mini" in line]
    assert (code, err) == (0, "")
    assert [row[:4] for row in rows] == [["★", "1", "c7", "0.9500"], ["2", "c0", "0.8000", "1"]]


def test_json_rows_carry_the_papers_result_dictionary(qtt):
    _, out, _ = qtt("leaderboard", "rec", "-o", "json")

    winner = json.loads(out)[0]
    paper = {name: winner[name] for name in ("config_id", "score", "cost", "fidelity", "status")}
    assert paper == {"config_id": 7, "score": 0.95, "cost": 4.5, "fidelity": 2, "status": True}
    assert (winner["checkpoint"], winner["best"], winner["rank"]) == ("c7/f2", True, 1)
    assert winner["hyperparameters"]["lr"] == 0.01


@pytest.mark.parametrize("form", ["json", "yaml", "csv"])
def test_every_format_says_the_same(qtt, form):
    _, out, _ = qtt("statistics", "rec", "-o", form)

    read = {
        "json": json.loads,
        "yaml": yaml.safe_load,
        "csv": lambda text: list(csv.DictReader(io.StringIO(text))),
    }[form]
    rows = read(out)
    assert [str(row["config_id"]) for row in rows] == ["0", "7", "9"]
    assert [row["state"] for row in rows] == ["paused", "paused", "oom"]
    assert [str(row["status"]).lower() for row in rows] == ["true", "true", "false"]
    assert rows[2]["reason"] == "out of memory at batch 64"


def test_top_cuts_the_leaderboard(qtt):
    _, out, _ = qtt("leaderboard", "rec", "--top", "1", "-o", "json")

    assert [row["config_id"] for row in json.loads(out)] == [7]


def test_a_checkpoint_that_was_deleted_is_not_ranked(qtt, recorded):
    manifest = recorded.run_dir / "c7" / "f2" / "manifest.json"
    manifest.rename(manifest.with_name("gone"))
    try:
        _, out, _ = qtt("leaderboard", "rec", "-o", "json")
    finally:
        manifest.with_name("gone").rename(manifest)

    winner = json.loads(out)[0]
    assert (winner["config_id"], winner["score"], winner["fidelity"]) == (7, 0.9, 3)


def test_logs_show_every_attempt_and_how_it_ended(qtt):
    code, out, _ = qtt("logs", "rec", "c7")

    assert code == 0
    assert out.index("==> c7/attempts/f2.a0 (ok) <==\nfirst") < out.index(
        "f3.a0 (preempted) <==\nsecond"
    )


def test_logs_last_shows_the_newest_attempt_only(qtt):
    _, out, _ = qtt("logs", "rec", "7", "--last")

    assert "second" in out
    assert "first" not in out


def test_logs_of_an_unknown_configuration_name_the_known_ones(qtt):
    code, _, err = qtt("logs", "rec", "88")

    assert code == 64
    assert "it holds logs of 7" in err


def test_get_tells_phase_budget_and_best(qtt):
    code, out, _ = qtt("get", "rec")

    assert code == 0
    assert "Completed" in out
    assert "0.9400  c7 mini_vit at epoch 2" in out


def test_watch_ends_with_the_run(qtt):
    code, out, _ = qtt("watch", "rec")

    assert code == 0
    assert out.count("Completed") == 1


def test_ledger_export_is_a_header_and_every_event(qtt, recorded, tmp_path):
    code, out, _ = qtt("ledger", "export", "rec", tmp_path / "ledger.jsonl")

    header, *events = map(json.loads, (tmp_path / "ledger.jsonl").read_text().splitlines())
    assert (code, out.split()[0]) == (0, str(len(events)))
    assert (header["k"], header["uid"], sorted(header["configs"])) == (
        "header",
        recorded.uid,
        ["0", "7", "9"],
    )
    assert [event["k"] for event in events][:3] == ["run", "open", "prepared"]


def test_an_unknown_run_lists_the_runs_there_are(qtt):
    code, _, err = qtt("statistics", "nope")

    assert code == 64
    assert "runs here: rec" in err


def test_a_run_can_be_named_by_its_folder(qtt, recorded):
    code, out, _ = qtt("statistics", recorded.state_dir / "rec", "-o", "json")

    assert code == 0
    assert len(json.loads(out)) == 3


def test_a_test_folder_that_is_not_there_is_a_data_error(qtt, tmp_path):
    code, _, err = qtt("leaderboard", "rec", "--test", tmp_path / "none")

    assert code == 65
    assert "no such folder" in err


# --- lint -----------------------------------------------------------------------------------------

GOOD = {
    "apiVersion": "quicktune.dev/v1alpha1",
    "kind": "TuningRun",
    "metadata": {"name": "birds"},
    "spec": {"dataset": {"claimName": "birds"}, "budget": {"maxSteps": 4}},
}


def write_manifest(folder, **spec):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "spec": {**GOOD["spec"], **spec}}))
    return path


def test_lint_of_a_good_manifest_is_ok(tmp_path, capsys):
    code = cli.main(["lint", str(write_manifest(tmp_path))])

    assert code == 0
    assert capsys.readouterr().out.endswith("run.yaml: ok\n")


def test_lint_lists_every_fault_and_exits_64(tmp_path, capsys):
    path = write_manifest(tmp_path, parallelism="two", typo=1, budget={"maxSteps": 0})

    code = cli.main(["lint", str(path), "-o", "json"])

    report = json.loads(capsys.readouterr().out)
    assert (code, report["ok"]) == (64, False)
    assert {"spec.parallelism", "spec.typo", "spec.budget.maxSteps"} <= {
        fault["field"] for fault in report["faults"]
    }


@pytest.mark.parametrize(
    ("mount", "says"), [("birds", "CLAIM=/path"), ("birds=/nowhere", "no such folder")]
)
def test_a_mount_that_cannot_be_used_is_a_fault(tmp_path, capsys, mount, says):
    code = cli.main(["lint", str(write_manifest(tmp_path)), "--mount", mount])

    captured = capsys.readouterr()
    assert code == 64
    assert says in captured.out + captured.err


@pytest.mark.parametrize("verb", [[], ["run"], ["lint"], ["leaderboard"], ["statistics"], ["logs"]])
def test_help_fits_into_eighty_columns(verb, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")

    with pytest.raises(SystemExit):
        cli.main([*verb, "--help"])

    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_narrow_terminal_gets_fewer_columns_and_never_a_cut_number(width):
    record = {"a": "0.123456789", "b": "12345.6", "c": "mini_resnet", "d": "x" * 90}
    columns = [
        Column(title=name, cell=lambda r, name=name: r[name], flexible=name == "d")
        for name in record
    ] + [Column(title="last", cell=lambda _r: "y" * 20)]

    text = render([record], "table", columns, width=width)

    assert max(map(len, text.splitlines())) <= width
    for name in "abc":
        assert (record[name] in text) == (name in text.splitlines()[1].split())
    assert "0.123456789" in text
