"""Whole local runs: real runner, store, optimizer worker and processes; a trainer without torch."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from ConfigSpace import ConfigurationSpace, Float

from qtt_core.hub import load_hub

HERE = Path(__file__).parent
QTT = (sys.executable, "-m", "qtt_operator")
DEADLINE = 60.0


def manifest(folder, **spec):
    """A manifest whose run decides by scores alone, so that it repeats itself."""
    (folder / "images" / "test").mkdir(parents=True, exist_ok=True)
    raw = {
        "apiVersion": "quicktune.dev/v1alpha1",
        "kind": "TuningRun",
        "metadata": {"name": "toy"},
        "spec": {
            "dataset": {"claimName": "images"},
            "search": {"space": "native", "hub": "tiny", "poolSize": 12},
            "fidelity": {"max": 3, "stepsPerJob": 1},
            "optimizer": {"algorithm": "FreezeThawRandom", "seed": 5, "costAware": False},
            "budget": {"maxSteps": 6},
            **spec,
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def wait_for_start(runner, number):
    """Wait until this many jobs (prepare is the first) have been started by their parent."""
    deadline = time.monotonic() + DEADLINE
    while (runner.folder / "trace.jsonl").read_text().count('"started"') < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Runner:
    """`toy_run.py` on one manifest and state folder."""

    def __init__(self, folder, **spec):
        self.manifest = manifest(folder, **spec)
        self.state = folder / "state"
        self.folder = self.state / "toy"
        self.processes = []

    def close(self):
        for process in self.processes:
            process.kill()
            process.wait(timeout=DEADLINE)
            process.stdout.close()
            process.stderr.close()

    def start(self, *options, seconds_per_epoch=0.02, trouble=""):
        command = [sys.executable, str(HERE / "toy_run.py"), str(self.manifest), str(self.state)]
        env = {
            **os.environ, "TOY_SECONDS": str(seconds_per_epoch), "TOY_TROUBLE": trouble,
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        process = subprocess.Popen(
            [*command, *options],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def run(self, *options, **environment):
        process = self.start(*options, **environment)
        out, err = process.communicate(timeout=DEADLINE)
        return process.returncode, out, err

    def ledger(self):
        done = subprocess.run(
            [*QTT, "ledger", "export", "toy", "-", "--state-dir", str(self.state)],
            capture_output=True, text=True, check=True, timeout=DEADLINE,
        )  # fmt: skip
        return [json.loads(line) for line in done.stdout.splitlines()]

    def sequence(self):
        """(configuration, epoch, score) in the order of the ledger."""
        header, *events = self.ledger()
        return [
            (json.dumps(header["configs"][event["c"]], sort_keys=True), epoch, score)
            for event in events
            if event["k"] == "done"
            for epoch, score, _ in json.loads(event["epochs"])
        ]

    def trained(self):
        (path,) = self.folder.glob("runs/*/trained.txt")
        return path.read_text().splitlines()


def wait_for(process, words):
    """Read the process's lines until one holds the words."""
    deadline = time.monotonic() + DEADLINE
    for line in process.stderr:
        if words in line:
            return line
        assert time.monotonic() < deadline
    raise AssertionError(f"ended without saying {words!r}")


def kill_at(runner, words, **environment):
    """Start the runner; kill it when it says the words."""
    process = runner.start(**environment)
    wait_for(process, words)
    process.kill()
    process.wait(timeout=DEADLINE)


@pytest.fixture
def make_runner(tmp_path):
    made = []

    def make(**spec):
        made.append(Runner(tmp_path, **spec))
        return made[-1]

    yield make
    for runner in made:
        runner.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    runner = Runner(tmp_path_factory.mktemp("undisturbed"))
    yield runner, runner.run()
    runner.close()


@pytest.fixture
def copy_of_the_ended(make_runner, undisturbed):
    def make(**spec):
        runner = make_runner(**spec)
        shutil.copytree(undisturbed[0].state, runner.state)
        return runner

    return make


def test_a_run_ends_complete_with_leaderboard_checkpoint_test_score_and_reason(undisturbed):
    runner, (code, out, err) = undisturbed

    assert code == 0, err
    assert "earlier runner" not in err
    assert "BudgetExhausted: 6 of 6 steps used" in out
    (path,) = [line.split(": ", 1)[1] for line in out.splitlines() if "best checkpoint:" in line]
    assert (Path(path) / "manifest.json").is_file()
    assert "top1 on the test split, never used in the search: 0.7500" in out
    assert "was proposed by" in out.splitlines()[-1]
    assert len(runner.trained()) == 6


def test_running_a_complete_run_again_only_reports(undisturbed):
    runner, (_, out, _) = undisturbed

    code, again, err = runner.run()

    assert code == 0, err
    assert again.splitlines()[-3:] == out.splitlines()[-3:]
    assert len(runner.trained()) == 6


def test_status_file_says_what_the_ledger_says(undisturbed):
    runner, _ = undisturbed

    status = yaml.safe_load((runner.folder / "status.yaml").read_text())

    assert (status["phase"], status["consumed"]["steps"]) == ("Completed", 6)


def test_a_runner_killed_again_and_again_ends_with_the_undisturbed_sequence(
    make_runner, undisturbed
):
    """Nothing is told or charged twice: every step has one result, every epoch was told once."""
    runner = make_runner()
    for words in ("reading the data", " epoch 1:", "[step 2 of 6", "[step 4 of 6"):
        kill_at(runner, words, seconds_per_epoch=0.15)

    code, _, err = runner.run()

    assert code == 0, err
    assert runner.sequence() == undisturbed[0].sequence()
    keys = [(event["c"], event["to"]) for event in runner.ledger() if event["k"] == "done"]
    assert len(keys) == len(set(keys)) == 6
    assert len(runner.trained()) == len(set(runner.trained())), "a committed step was trained again"


def test_what_the_user_knows_holds_over_a_kill(make_runner):
    """Named configurations first and in order, narrowed choices and a cut hub ever after."""
    runner = make_runner(
        search={
            "space": "native", "hub": "tiny", "poolSize": 12,
            "modelLimits": {"maxParams": 400_000},
            "overrides": {"opt": "sgd,adamw", "drop": "0.2"},
            "initialConfigs": [{"lr": "0.01", "opt": "sgd"}, {"lr": "0.0005"}, {"lr": "0.005"}],
        },
        optimizer={"algorithm": "ASHA", "seed": 5, "costAware": False},
        budget={"maxSteps": 9},
    )  # fmt: skip
    small = {card.name for card in load_hub("tiny").cards if card.params <= 400_000}
    assert 0 < len(small) < len(load_hub("tiny").cards)
    kill_at(runner, "[step 2 of 9", seconds_per_epoch=0.1)

    code, _, err = runner.run()

    assert code == 0, err
    header, *events = runner.ledger()
    configs = [header["configs"][e["c"]] for e in events if e["k"] == "open" and e["c"].isdigit()]
    assert [c["lr"] for c in configs[:3]] == [0.01, 0.0005, 0.005]
    assert {c["model"] for c in configs} <= small
    assert {c["opt"] for c in configs} <= {"sgd", "adamw"}
    assert {c["drop"] for c in configs} == {0.2}
    assert sum(e["k"] == "done" for e in events) == 9


def test_an_optimizer_of_optuna_searches_and_goes_on_after_a_kill(make_runner):
    """Its suggestions lie outside the pool: what was opened comes back from the ledger."""
    runner = make_runner(
        optimizer={"algorithm": "External", "name": "optuna-tpe", "seed": 5},
        budget={"maxSteps": 9},
    )
    kill_at(runner, "[step 2 of 9", seconds_per_epoch=0.1)

    code, out, err = runner.run()

    assert code == 0, err
    assert "9 of 9 steps used" in out
    opened = [e for e in runner.ledger() if e.get("k") == "open" and e["c"].isdigit()]
    rules = [json.loads(event["why"])["rule"] for event in opened]
    assert rules.count("suggested by Optuna") >= 4
    assert any(rule.startswith("asha, promoted") for rule in rules)
    assert len(runner.trained()) == len(set(runner.trained())) == 9


def test_a_killed_trainer_costs_one_attempt_and_the_sequence_stays(make_runner, undisturbed):
    runner = make_runner()
    process = runner.start(seconds_per_epoch=1)
    wait_for(process, "[step 2 of 6")
    wait_for_start(runner, 4)
    leader = json.loads((runner.folder / "processes.json").read_text())[0][0]
    os.killpg(leader, signal.SIGKILL)

    _, err = process.communicate(timeout=DEADLINE)

    assert process.returncode == 0, err
    assert "attempt 2: ServeDied" in err
    assert runner.sequence() == undisturbed[0].sequence()


def test_the_first_ctrl_c_lets_the_running_step_end_and_the_command_resumes(
    make_runner, undisturbed
):
    runner = make_runner()
    process = runner.start(seconds_per_epoch=0.3)
    wait_for(process, "[step 2 of 6")
    process.send_signal(signal.SIGINT)

    out, err = process.communicate(timeout=DEADLINE)

    assert process.returncode == 75, err
    assert "Interrupted: interrupted; the same command resumes" in out
    kinds = [event["k"] for event in runner.ledger()]
    assert "retry" not in kinds, "a running step was cut off"
    assert len(runner.trained()) == kinds.count("done")
    code, _, err = runner.run()
    assert code == 0, err
    assert runner.sequence() == undisturbed[0].sequence()


def test_a_second_ctrl_c_ends_the_running_step_at_once(make_runner, tmp_path):
    runner = make_runner()
    process = runner.start(seconds_per_epoch=30)
    wait_for(process, " epoch 1:")
    began = time.monotonic()
    for _ in range(2):
        time.sleep(0.3)  # two signals within one turn of the kernel are one
        process.send_signal(signal.SIGINT)

    _, err = process.communicate(timeout=DEADLINE)

    assert process.returncode == 75, err
    assert time.monotonic() - began < 25
    assert [e["reason"] for e in runner.ledger() if e["k"] == "retry"] == ["Stopped"]


def test_a_raised_budget_goes_on_where_the_run_ended(copy_of_the_ended):
    runner = copy_of_the_ended(budget={"maxSteps": 7})

    code, out, err = runner.run()

    assert code == 0, err
    assert "7 of 7 steps used" in out
    assert len(runner.trained()) == 7


@pytest.mark.parametrize(
    ("trouble", "code", "says"),
    [
        ("disk_full", 74, "DiskFull: the trainer's own words; free some, the same command resumes"),
        ("dataset_changed", 65, "DatasetChanged: the trainer's own words"),
    ],
)
def test_trouble_that_retrying_cannot_end_ends_the_run_until_a_person_has_looked(
    copy_of_the_ended, trouble, code, says
):
    runner = copy_of_the_ended(budget={"maxSteps": 7})

    ended, out, err = runner.run(trouble=trouble)

    assert (ended, says in out) == (code, True), out + err
    assert sum(event["k"] == "open" for event in runner.ledger()) < 10, "tried for ever"
    ended, _, err = runner.run()
    assert ended == 0, err
    assert "going on where the run stopped" in err
    assert len(runner.trained()) == 7


def test_a_changed_manifest_is_refused_with_the_fields_and_fresh_starts_over(copy_of_the_ended):
    changed = {"search": {"space": "native", "hub": "tiny", "poolSize": 13}}
    runner = copy_of_the_ended(budget={"maxSteps": 1}, **changed)

    code, _, err = runner.run()

    assert code == 64
    assert "spec.search.poolSize" in err
    assert "--fresh" in err
    code, _, err = runner.run("--fresh")
    assert code == 0, err
    assert len(list(runner.state.glob("toy.*/uid"))) == 1, "the old state is kept"


@pytest.fixture
def own_space(make_runner, tmp_path):
    """A run over a ConfigSpace of the user's own: one learning rate, one model."""

    def make(low=2e-3, high=3e-3):
        cs = ConfigurationSpace()
        cs.add(Float("lr", (low, high), log=True))
        (tmp_path / "space.json").write_text(json.dumps(cs.to_serialized_dict()))
        search = {"configSpaceRef": {"name": "own"}, "hub": "tiny", "models": ["mini_resnet"]}
        return make_runner(search=search, budget={"maxSteps": 3})

    return make


def test_a_space_of_ones_own_is_what_the_run_searches_and_may_not_change(own_space):
    runner = own_space()

    code, _, err = runner.run()

    assert code == 0, err
    configs = runner.ledger()[0]["configs"].values()
    assert {frozenset(config) for config in configs} == {frozenset({"lr", "model"})}
    assert all(2e-3 <= config["lr"] <= 3e-3 for config in configs)
    code, _, err = own_space(high=4e-3).run()
    assert code == 64
    assert "the file of spec.search.configSpaceRef" in err


def test_two_runners_of_one_run_exclude_each_other(make_runner, tmp_path):
    runner = make_runner()
    first = runner.start(seconds_per_epoch=30)
    wait_for(first, " epoch 1:")

    code, _, err = runner.run()

    assert code == 75
    assert f"process {first.pid} is running this run" in err


def test_an_unreachable_redis_ends_with_69_and_its_address(make_runner, tmp_path):
    code, _, err = make_runner().run("redis://127.0.0.1:1/0")

    assert code == 69
    assert "127.0.0.1:1" in err
    assert "correct --redis-url" in err


def test_a_missing_claim_says_which_mount_to_type(make_runner, tmp_path):
    runner = make_runner()
    (tmp_path / "images" / "test").rmdir()
    (tmp_path / "images").rmdir()

    code, _, err = runner.run()

    assert code == 64
    assert "--mount images=" in err
    assert "Traceback" not in err
