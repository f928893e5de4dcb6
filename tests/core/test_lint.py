"""`qtt lint`: every fault of a manifest file in one go, with places a person can go to."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ConfigSpace import ConfigurationSpace, Float

from qtt_core.catalogue import CARD, SHIPPED
from qtt_core.errors import SpecError
from qtt_core.hub import load_hub
from qtt_operator.lint import LintReport, lint_file, load_checked, load_run
from qtt_operator.manifest_file import scan_text

HEAD = """\
apiVersion: quicktune.dev/v1alpha1
kind: TuningRun
metadata: {name: run}
"""
BODY = "  dataset: {claimName: data}\n  budget: {maxSteps: 10}\n"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a manifest with the given lines of spec and returns its path."""

    def write(spec: str = "", head: str = HEAD, body: str = BODY) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(f"{head}spec:\n{body}{spec}")
        return path

    return write


def messages(report: LintReport) -> list[str]:
    return [str(fault) for fault in report.faults]


def fields(report: LintReport) -> list[str]:
    return [fault.field for fault in report.faults]


# --- YAML ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place", "word"),
    [
        ("a:\n\tb: 1\n", "f.yaml:2:1", "a tab"),
        ("a: [1\n", "f.yaml:2:1", "expected"),
        ("a: b: c\n", "f.yaml:1:5", "mapping values"),
        ('a: "x\n', "f.yaml:2:1", "quoted scalar"),
        ("a: !!python/object/apply:os.system [ls]\n", "f.yaml:1:4", "constructor for the tag"),
        ("a: 1\n---\nb: 2\n", "f.yaml", "2 documents"),
        ("kind: TuningRun\n---\nkind: TuningRun\n", "f.yaml", "2 documents"),
        ("", "f.yaml", "an empty file"),
        ("# only a comment\n", "f.yaml", "an empty file"),
        ("a: \x01\n", "f.yaml", "unacceptable character"),
        ("x: &x [*x]\n", "f.yaml", "aliases"),
        ("? [a]\n: b\n", "f.yaml:1:3", "unhashable"),
        ("a: " + "[" * 4000, "f.yaml", "recursion"),
    ],
    ids=[
        "tab",
        "open list",
        "colon",
        "open quote",
        "python object",
        "two documents, no run",
        "two runs",
        "empty",
        "comment",
        "control character",
        "endless",
        "list as key",
        "deep",
    ],
)
def test_broken_yaml_is_a_fault_with_its_place(text: str, place: str, word: str) -> None:
    with pytest.raises(SpecError) as caught:
        scan_text(text, "f.yaml")

    assert caught.value.faults[-1].field == place
    assert word in str(caught.value)


def test_aliases_of_aliases_do_not_fill_the_memory() -> None:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]

    with pytest.raises(SpecError, match="aliases"):
        scan_text("\n".join(lines), "f.yaml")


def test_keys_that_stand_twice_are_all_named_with_line_and_column() -> None:
    _, faults = scan_text("a: 1\nb: {c: 1, c: 2}\n'a': 3\n", "f.yaml")

    assert [fault.field for fault in faults] == ["f.yaml:3:1", "f.yaml:2:11"]
    assert "first in line 1" in str(faults[0])


def test_a_merge_key_is_no_double_key() -> None:
    document, faults = scan_text("x: &x {k: 1}\ny: {<<: *x, k: 2}\n", "f.yaml")

    assert (document, faults) == ({"x": {"k": 1}, "y": {"k": 2}}, [])


def test_scalars_mean_what_kubectl_reads() -> None:
    values = ["1e-3", "2026-01-01", "4:30", ".5", "010", "0x1F", "yes", "08", "1_000", "-3"]
    text = "".join(f"{key}: {value}\n" for key, value in zip("abcdefghij", values, strict=True))

    document, _ = scan_text(text, "f.yaml")

    assert document == {
        "a": 0.001,
        "b": "2026-01-01",
        "c": "4:30",
        "d": 0.5,
        "e": 8,
        "f": 31,
        "g": True,
        "h": 8.0,
        "i": 1000,
        "j": -3,
    }


def test_document_marks_around_one_document_are_fine() -> None:
    assert scan_text("---\na: 1\n---\n", "f.yaml")[0] == {"a": 1}


@pytest.mark.parametrize("kind", ["missing", "folder", "latin-1", "large"])
def test_a_file_that_cannot_be_read_is_a_fault(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "latin-1":
        path.write_bytes("a: é".encode("latin-1"))
    elif kind == "large":
        path.write_text("# x\n" * 300_000)

    report = lint_file(path)

    assert fields(report) == [str(path)]


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("\ufeff" + HEAD + "spec:\n" + BODY)

    assert lint_file(path).ok


@pytest.mark.parametrize("text", ["- a\n", "text\n", "3\n"])
def test_a_file_that_is_no_mapping_is_a_fault(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)

    assert fields(lint_file(path)) == ["manifest"]


def test_another_kind_of_object_is_named(write: Write) -> None:
    report = lint_file(write(head=HEAD.replace("TuningRun", "Pod")))

    assert messages(report) == ["kind: 'Pod'; use TuningRun"]


# --- the whole manifest --------------------------------------------------------------------------


def test_a_good_manifest_comes_with_hub_space_and_canonical_configurations(write: Write) -> None:
    path = write(
        "  search:\n"
        "    space: native\n"
        "    models: [dla46x_c, edgenext_small]\n"
        '    overrides: {amp: "true"}\n'
        '    initialConfigs: [{model: dla46x_c, lr: "1e-3", stoch_norm: "true"}]\n'
        "  fidelity: {max: 9, step: 3}\n"
    )

    checked = lint_file(path).checked

    assert checked is not None
    assert checked.hub.names == ("edgenext_small", "dla46x_c")
    assert (checked.space.max_fidelity, checked.space.step) == (9, 3)
    assert checked.space.legal("amp") == (True,)
    assert checked.initial[0]["lr"] == 0.001
    assert checked.initial[0]["stoch_norm"] is True
    assert load_checked(path).space.sha == checked.space.sha
    assert load_run(path).name == "run"


def test_faults_of_every_layer_are_gathered_in_one_go(write: Write) -> None:
    path = write(
        "  parallelism: -1\n"
        "  budget: {maxSteps: 3}\n"
        "  search:\n"
        "    space: native\n"
        "    poolSize: 0\n"
        '    overrides: {lr: "7", ampp: "true"}\n'
        '    initialConfigs: [{lr: "0.5", modle: x}, {delta_reg: "0.1", cotuning_reg: "1"}]\n'
    )

    report = lint_file(path)

    assert fields(report) == [
        f"{path}:8:3",
        "spec.parallelism",
        "spec.search.poolSize",
        "spec.search.overrides.ampp",
        "spec.search.overrides.lr",
        "spec.search.initialConfigs[0].lr",
        "spec.search.initialConfigs[0].modle",
        "spec.search.initialConfigs[1].cotuning_reg and delta_reg",
    ]
    assert report.checked is None
    with pytest.raises(SpecError):
        load_run(path)


@pytest.mark.parametrize(
    ("search", "field", "word"),
    [
        ("space: nativ", "spec.search.space", "paper-table3"),
        ("space: native, hub: timm", "spec.search.hub", "timm24, tiny"),
        ("space: native, models: [resnet]", "spec.search.models", "hub timm24 has"),
        (
            'space: native, modelLimits: {maxGMACs: "0.1"}',
            "spec.search.modelLimits",
            "leaves no model",
        ),
        (
            "space: native, hubRef: {name: mine}",
            "spec.search.hubRef",
            "put the ConfigMap's key there",
        ),
        ("configSpaceRef: {name: mine}", "spec.search.configSpaceRef", "space.json"),
    ],
)
def test_a_reference_that_leads_nowhere_is_a_fault(
    search: str, field: str, word: str, write: Write
) -> None:
    report = lint_file(write(f"  search: {{{search}}}\n"))

    assert fields(report) == [field]
    assert word in messages(report)[0]


def test_limits_use_gmacs_at_the_runs_image_size(write: Write) -> None:
    limits = '  search: {space: native, modelLimits: {maxGMACs: "0.1"}}\n'
    body = "  dataset: {claimName: data, imageSize: 64}\n  budget: {maxSteps: 10}\n"

    report = lint_file(write(limits, body=body))

    assert report.checked is not None
    assert "edgenext_small" in report.checked.hub.names
    assert any("volo_d1_384" in str(fault) for fault in report.advice)


@pytest.mark.parametrize("place", ["mine/hub.json", "hub.json"])
def test_a_hub_of_ones_own_lies_beside_the_manifest(place: str, write: Write) -> None:
    path = write("  search: {space: native, hubRef: {name: mine}}\n")
    file = path.parent / place
    file.parent.mkdir(exist_ok=True)
    card = load_hub("timm24").card("dla46x_c").to_json()
    file.write_text(json.dumps({"cards": [{**card, "name": "own", "default": True}]}))

    report = lint_file(path)

    assert report.checked is not None, messages(report)
    assert report.checked.hub.name == "mine"
    assert report.checked.space.legal("model") == ("own",)
    before = report.checked.files
    file.write_text(json.dumps(json.loads(file.read_text()), indent=1))
    assert load_checked(path).files == before, "laid out differently, the same cards"
    file.write_text(file.read_text().replace('"own"', '"other"'))
    assert load_checked(path).files != before
    assert set(before) == {"spec.search.hubRef"}


def test_a_broken_hub_file_is_named_with_its_place(write: Write) -> None:
    path = write("  search: {space: native, hubRef: {name: mine}}\n")
    (path.parent / "hub.json").write_text('{"cards": [}')

    assert fields(lint_file(path)) == ["hub mine, line 1, column 12"]


def test_a_space_of_ones_own_lies_beside_the_manifest(write: Write) -> None:
    path = write("  search: {configSpaceRef: {name: mine}, models: [dla46x_c]}\n")
    cs = ConfigurationSpace()
    cs.add(Float("lr", (1e-5, 1e-2), log=True))
    (path.parent / "space.json").write_text(json.dumps(cs.to_serialized_dict()))

    report = lint_file(path)

    assert report.checked is not None, messages(report)
    assert report.checked.space.space_id == "custom"
    assert report.checked.space.names == ("lr", "model")


@pytest.mark.parametrize(
    ("dataset", "field", "word"),
    [
        ("format: CSV", "spec.dataset.format", "convert the data set to ImageFolder"),
        ("format: WebDataset", "spec.dataset.format", "not read yet"),
        ("format: Parquet", "spec.dataset.format", "not read yet"),
        ("inChannels: 5", "spec.dataset.inChannels", "3 (RGB)"),
    ],
)
def test_data_that_the_trainer_cannot_read_is_a_fault_already_in_the_manifest(
    dataset: str, field: str, word: str, write: Write
) -> None:
    path = write(body=f"  dataset: {{claimName: data, {dataset}}}\n  budget: {{maxSteps: 10}}\n")

    report = lint_file(path)

    assert fields(report) == [field]
    assert word in messages(report)[0]
    with pytest.raises(SpecError, match=field):
        load_checked(path)


def test_a_trainer_of_ones_own_may_read_anything(write: Write) -> None:
    body = (
        "  dataset: {claimName: data, format: Parquet, inChannels: 5}\n  budget: {maxSteps: 10}\n"
    )

    assert lint_file(write("  trainer: {custom: true}\n", body=body)).ok


def test_an_optimizer_that_is_not_installed_here_is_advised_on_and_does_not_run(
    write: Write,
) -> None:
    """A manifest for a cluster may name what the laptop lacks."""
    path = write("  optimizer: {algorithm: External, name: nobodys}\n")

    report = lint_file(path)

    assert report.ok
    assert [fault.field for fault in report.advice] == ["spec.optimizer.name"]
    assert "entry point of quicktune.optimizers" in str(report.advice[0])
    with pytest.raises(SpecError, match="nobodys"):
        load_checked(path)


def test_overrides_of_a_space_of_ones_own_are_refused(write: Write) -> None:
    path = write('  search: {configSpaceRef: {name: mine}, overrides: {lr: "1e-3"}}\n')

    assert fields(lint_file(path)) == ["spec.search.overrides"]


@pytest.mark.parametrize(
    ("spec", "advised"),
    [
        (
            '  search: {space: native, overrides: {opt: sgd, momentum: "0.9"}}\n',
            "spec.search.overrides.momentum",
        ),
        (
            '  search: {space: native, initialConfigs: [{opt: sgd, momentum: "0.9"}]}\n',
            "spec.search.initialConfigs[0].momentum",
        ),
        (
            '  search: {space: native, initialConfigs: [{lr: "1e-3"}, {lr: "0.001"}]}\n',
            "spec.search.initialConfigs[1]",
        ),
        ("  optimizer: {refit: Never}\n", "spec.optimizer.refit"),
        (
            "  search: {space: native, modelLimits: {licences: [MIT, gpl]}}\n",
            "spec.search.modelLimits.licences[1]",
        ),
    ],
)
def test_settings_without_effect_are_advised_against(spec: str, advised: str, write: Write) -> None:
    report = lint_file(write(spec))

    assert report.ok
    assert [fault.field for fault in report.advice] == [advised]


# --- local notes ---------------------------------------------------------------------------------


def test_fields_that_need_a_cluster_are_a_note(write: Write) -> None:
    report = lint_file(write("  queueName: q\n"))

    assert report.ok
    assert any("spec.queueName" in note for note in report.notes)


def test_a_missing_claim_is_a_note_that_says_what_to_type(write: Write) -> None:
    report = lint_file(write())

    assert report.ok
    assert any("--mount data=/path" in note for note in report.notes)


def test_a_claim_beside_the_manifest_or_mounted_needs_no_note(write: Write, tmp_path: Path) -> None:
    path = write()
    folder = tmp_path / "elsewhere"
    folder.mkdir()

    assert lint_file(path, {"data": folder}).notes == ()
    (tmp_path / "data").mkdir()
    assert lint_file(path).notes == ()


def test_a_mount_that_is_not_there_is_a_fault(write: Write, tmp_path: Path) -> None:
    report = lint_file(write(), {"data": tmp_path / "nowhere"})

    assert fields(report) == ["--mount"]


def test_a_custom_trainer_lints_and_runs_where_its_command_is_named(write: Write) -> None:
    path = write("  trainer: {custom: true}\n  objective: {metric: iou}\n")

    assert lint_file(path).ok
    with pytest.raises(SpecError, match="--trainer COMMAND"):
        load_run(path)
    assert load_checked(path, own_trainer=("true",)).run.spec.trainer.custom


def test_the_report_is_plain_json(write: Write) -> None:
    report = lint_file(write("  parallelism: x\n  queueName: q\n"))

    raw = json.loads(json.dumps(report.to_json()))

    assert raw["ok"] is False
    assert raw["faults"][0]["field"] == "spec.parallelism"
    assert raw["notes"]


@pytest.mark.parametrize("name", ["minimal", "full"])
def test_the_examples_have_no_fault(name: str, root: Path) -> None:
    report = lint_file(root / "examples" / f"{name}.yaml")

    assert report.ok, messages(report)


def test_linting_loads_no_torch(root: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from qtt_operator.lint import lint_file\n"
        "assert lint_file(Path('examples/full.yaml')).ok\n"
        "heavy = {'torch', 'timm', 'redis', 'kopf', 'kubernetes'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )

    assert ended.returncode == 0, ended.stderr


# --- priors ---------------------------------------------------------------------------------------

QUICKTUNE = "  search: {space: native, hub: tiny, portfolio: PRIOR}\n"


@pytest.fixture
def priors(tmp_path: Path) -> Path:
    """A folder of own priors that holds `fish`."""
    folder = tmp_path / "own"
    (folder / "fish").mkdir(parents=True)
    shutil.copy(SHIPPED / "micro" / CARD, folder / "fish" / CARD)
    return folder


@pytest.mark.parametrize("name", ["Auto", "None", "micro", "mtlbm/mini", "fish"])
def test_a_prior_that_is_shipped_or_in_the_folder_is_fine(
    write: Write, priors: Path, name: str
) -> None:
    report = lint_file(write(QUICKTUNE.replace("PRIOR", name)), priors=priors)

    assert (report.faults, report.advice) == ((), ())


def test_a_prior_that_is_nowhere_is_a_fault_that_lists_those_there_are(
    write: Write, priors: Path
) -> None:
    report = lint_file(write(QUICKTUNE.replace("PRIOR", "birds")), priors=priors)

    (fault,) = report.faults
    assert (fault.field, fault.value) == ("spec.search.portfolio", "birds")
    assert all(word in fault.expected for word in ("Auto", "micro", "there: fish", "metatrain"))


def test_without_the_folder_it_is_advice_for_a_cluster_may_hold_it(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = lint_file(write(QUICKTUNE.replace("PRIOR", "birds")))

    assert report.faults == ()
    assert [fault.field for fault in report.advice] == ["spec.search.portfolio"]


def test_an_algorithm_that_reads_no_prior_may_name_any(write: Write, priors: Path) -> None:
    random = QUICKTUNE.replace("PRIOR", "birds") + "  optimizer: {algorithm: Random}\n"

    assert lint_file(write(random), priors=priors).faults == ()


def test_a_folder_of_priors_that_is_not_there_is_named(write: Write, tmp_path: Path) -> None:
    report = lint_file(write(QUICKTUNE.replace("PRIOR", "micro")), priors=tmp_path / "none")

    assert messages(report) == [f"--priors: '{tmp_path / 'none'}'; no such folder"]


def test_the_command_line_takes_the_folder(write: Write, priors: Path) -> None:
    path = write(QUICKTUNE.replace("PRIOR", "birds"))
    words = [sys.executable, "-m", "qtt_operator", "lint", str(path), "--priors", str(priors)]

    done = subprocess.run(words, capture_output=True, text=True, check=False)

    assert done.returncode == 64
    assert "spec.search.portfolio: 'birds'" in done.stdout
