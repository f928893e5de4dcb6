"""Claims, mounts, the run's folder and what starting again means."""

import os
from dataclasses import replace

import pytest

from qtt_core.errors import SpecDriftError, SpecError, VolumeError
from qtt_core.ledger.events import Close, Note, Reopen, Run
from qtt_core.ledger.fold import LedgerState
from qtt_core.spec import parse_manifest
from qtt_operator.local_setup import check_drift
from qtt_operator.local_start import started_again
from qtt_operator.run_folder import (
    RunFolder,
    claim_folder,
    find_run,
    parse_mounts,
    write_atomically,
)


def test_a_claim_is_the_folder_of_its_name_beside_the_manifest(tmp_path):
    (tmp_path / "images" / "cub").mkdir(parents=True)

    assert claim_folder("f", "images", {}, tmp_path) == tmp_path / "images"
    assert claim_folder("f", "images", {}, tmp_path, path="cub") == tmp_path / "images" / "cub"


def test_a_mount_wins_over_the_folder_beside_the_manifest(tmp_path):
    for name in ("images", "elsewhere"):
        (tmp_path / name).mkdir()

    found = claim_folder("f", "images", {"images": tmp_path / "elsewhere"}, tmp_path)

    assert found == tmp_path / "elsewhere"


@pytest.mark.parametrize(
    ("claim", "path", "says"),
    [
        ("other", "", "--mount other=/path"),
        ("images", "nope", "it holds cub"),
        ("images", "../..", "stays inside the claim"),
        ("images", "/etc", "stays inside the claim"),
    ],
)
def test_a_claim_that_cannot_be_used_says_what_to_do(tmp_path, claim, path, says):
    (tmp_path / "images" / "cub").mkdir(parents=True)

    with pytest.raises(SpecError, match=says):
        claim_folder("spec.dataset.claimName", claim, {}, tmp_path, path=path)


def test_a_mount_that_is_not_there_is_the_fault_of_the_option(tmp_path):
    with pytest.raises(SpecError, match=r"--mount: 'images=.*gone'; no such folder"):
        claim_folder("f", "images", {"images": tmp_path / "gone"}, tmp_path)


def test_mounts_are_absolute_and_every_bad_one_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert parse_mounts(["a=data"]) == {"a": tmp_path / "data"}
    with pytest.raises(SpecError) as refused:
        parse_mounts(["a", "b=", "=c", "d=1", "d=2"])
    assert [fault.value for fault in refused.value.faults] == ["a", "b=", "=c", "d=2"]


def test_the_uid_is_drawn_once(tmp_path):
    folder = RunFolder(path=tmp_path / "run")

    assert folder.read_uid() is None
    assert folder.draw_uid() == folder.draw_uid() == folder.read_uid()


def test_setting_aside_twice_in_a_second_keeps_both(tmp_path):
    folder = RunFolder(path=tmp_path / "run")
    kept = []
    for _ in range(2):
        folder.draw_uid()
        kept.append(folder.set_aside(1.0))

    assert kept[0] != kept[1]
    assert all((path / "uid").exists() for path in kept)
    assert folder.set_aside(1.0) is None


def test_a_run_is_found_by_name_and_by_path_and_else_the_known_ones_are_named(tmp_path):
    folder = RunFolder(path=tmp_path / "state" / "birds")
    folder.draw_uid()

    assert find_run("birds", tmp_path / "state").path == folder.path
    assert find_run(str(folder.path), tmp_path / "nowhere").path == folder.path
    with pytest.raises(SpecError, match="runs here: birds"):
        find_run("bird", tmp_path / "state")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_a_volume_error(tmp_path):
    tmp_path.chmod(0o500)

    with pytest.raises(VolumeError, match="cannot write"):
        write_atomically(tmp_path / "file", "text")


def test_a_full_disk_is_named_with_its_path(tmp_path):
    """`/dev/full` refuses every byte, also to root."""
    with pytest.raises(VolumeError, match=r"cannot write|no space left"):
        write_atomically(tmp_path / "missing" / ("x" * 300), "text")


def make_run(**spec):
    return parse_manifest(
        {
            "apiVersion": "quicktune.dev/v1alpha1",
            "kind": "TuningRun",
            "metadata": {"name": "birds"},
            "spec": {"dataset": {"claimName": "d"}, "budget": {"maxSteps": 4}, **spec},
        }
    )


HUB = {"spec.search.hubRef": "aa"}


def recorded(run):
    return Run(
        name="birds", spec_hash="h", seed=0, algorithm="QuickTune", version="0", space_hash="s",
        spec=run.raw_spec, files=HUB,
    )  # fmt: skip


def test_a_raised_budget_is_no_drift():
    check_drift(recorded(make_run()), make_run(budget={"maxSteps": 9}, parallelism=3), HUB)


@pytest.mark.parametrize("before", [{}, HUB], ids=["an older ledger knows none", "same"])
def test_the_same_files_are_no_drift(before):
    check_drift(replace(recorded(make_run()), files=before), make_run(), HUB)


def test_a_changed_file_behind_a_field_is_drift():
    with pytest.raises(SpecDriftError, match=r"the file of spec\.search\.hubRef.*--fresh"):
        check_drift(recorded(make_run()), make_run(), {"spec.search.hubRef": "bb"})


def test_drift_names_every_immutable_field_and_fresh():
    changed = make_run(objective={"metric": "top5"}, fidelity={"max": 9})

    with pytest.raises(SpecDriftError, match="--fresh") as refused:
        check_drift(recorded(make_run()), changed, {})

    fields = " ".join(refused.value.fields)
    assert "spec.objective.metric" in fields
    assert "spec.fidelity.max" in fields


CLOSED = LedgerState(closed=Close(id="9-0", reason="BudgetExhausted"), last_id="9-0")


@pytest.mark.parametrize(
    ("state", "event"),
    [
        (LedgerState(), None),
        (CLOSED, None),
        (replace(CLOSED, closed=Close(id="9-0", reason="BadData")), Reopen),
        (replace(CLOSED, closed=Close(id="9-0", reason="TooManyFailedConfigs")), Reopen),
        (LedgerState(cancelled_in_a_row=3, last_id="9-0"), Note),
        (LedgerState(bugs_in_a_row=1, last_id="9-0"), Note),
    ],
)
def test_starting_again_is_the_word_that_a_failed_or_held_run_may_be_tried_again(state, event):
    again = started_again(state)

    assert (None if again is None else type(again[0])) is event
    assert again is None or "9-0" in again[1]
