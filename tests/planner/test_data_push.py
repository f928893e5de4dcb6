"""`qtt data push` with this machine's shell in the pod's place: what arrives, and when."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qtt_core.errors import ClusterError, ClusterUnavailableError, NotFoundError, SpecError
from qtt_operator import push_plan
from qtt_operator.cli import main
from qtt_operator.push import api_errors, build_pod, pod_on, push
from qtt_operator.push_plan import (
    CHUNK,
    Target,
    batches,
    parse_target,
    scan,
    tar_size,
    tar_stream,
    tops,
)


class Shell:
    """The pod's side as processes here; `break_after`: bytes of stdin until a line drops."""

    def __init__(self) -> None:
        self.break_after: list[int] = []
        self.streams = 0
        self.scripts: list[str] = []

    def __call__(self, script: str, words: Sequence[str], stdin: bytes | Iterator[bytes]) -> str:
        self.scripts.append(script)
        data = stdin if isinstance(stdin, bytes) else b"".join(stdin)
        limit = None
        if script == push_plan.EXTRACT:
            self.streams += 1
            limit = self.break_after.pop(0) if self.break_after else None
        done = subprocess.run(
            ["sh", "-c", script, "sh", *words], input=data[:limit], capture_output=True, check=False
        )
        if limit is not None:
            raise ClusterUnavailableError("the connection broke")
        if done.returncode:
            raise ClusterError(done.stderr.decode())
        return done.stdout.decode(errors="surrogateescape")


@pytest.fixture
def claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The claim as the pod sees it."""
    folder = tmp_path / "claim"
    folder.mkdir()
    monkeypatch.setattr(push_plan, "MOUNT", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images in two splits, names with blanks and umlauts."""
    for split in ("train", "val"):
        for number in range(6):
            path = tmp_path / "flowers" / split / "ein Gänseblümchen" / f"{number} $x'.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.urandom(1000 + number))
    return tmp_path / "flowers"


def sent(folder: Path, to: str, shell: Shell, *, replace: bool = False) -> list[str]:
    target = parse_target(to)
    return [item.path for item in push(scan(folder, target), target, shell, replace=replace)]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("to", "below"), [("c", ""), ("c:flowers", "flowers"), ("c:a/b/flowers/", "a/b/flowers")]
)
def test_a_folder_arrives_whole_and_leaves_nothing_else(
    claim: Path, folder: Path, to: str, below: str
) -> None:
    gone = sent(folder, to, Shell())

    assert len(gone) == 12
    assert contents(claim / below) == contents(folder)
    assert not [path for path in claim.rglob("*") if push_plan.STAGE in path.name]


def test_what_is_there_is_not_sent_again(claim: Path, folder: Path) -> None:
    sent(folder, "c:flowers", Shell())
    again = Shell()

    assert sent(folder, "c:flowers", again) == []
    assert again.scripts == [push_plan.LIST]


def test_other_contents_of_that_name_are_kept_unless_they_are_to_be_replaced(
    claim: Path, folder: Path
) -> None:
    (claim / "flowers").mkdir()
    (claim / "flowers" / "mine.png").write_bytes(b"mine")

    with pytest.raises(SpecError, match="--replace"):
        sent(folder, "c:flowers", Shell())
    assert contents(claim) == {"flowers/mine.png": b"mine"}

    sent(folder, "c:flowers", Shell(), replace=True)
    assert contents(claim / "flowers") == contents(folder)


def test_neighbours_on_the_claim_are_left_alone(claim: Path, folder: Path) -> None:
    (claim / "birds.txt").write_bytes(b"mine")

    sent(folder, "c", Shell())

    assert contents(claim) == {**contents(folder), "birds.txt": b"mine"}


def test_nothing_is_seen_before_all_is_there_and_a_break_is_gone_on_from(
    claim: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_plan, "BATCH_FILES", 4)
    shell = Shell()
    shell.break_after = [5000]
    seen: list[bool] = []

    def watched(script: str, words: Sequence[str], stdin: bytes | Iterator[bytes]) -> str:
        if script != push_plan.COMMIT:
            seen.append((claim / "flowers").exists())
        return shell(script, words, stdin)

    target = parse_target("c:flowers")
    push(scan(folder, target), target, watched, replace=False)

    assert contents(claim / "flowers") == contents(folder)
    assert not any(seen)
    assert shell.streams == 1 + 3  # the one that broke; three files of it were there already


def test_a_push_that_was_killed_is_gone_on_with_by_the_next(claim: Path, folder: Path) -> None:
    broken = Shell()
    broken.break_after = [6000, 0, 0, 0, 0]
    with pytest.raises(ClusterError, match="The same command goes on"):
        sent(folder, "c:flowers", broken)
    assert not (claim / "flowers").exists()

    rest = sent(folder, "c:flowers", Shell())

    assert 0 < len(rest) < 12
    assert contents(claim / "flowers") == contents(folder)


def test_leftovers_of_another_push_do_not_reach_the_target(claim: Path, folder: Path) -> None:
    stage = Path(parse_target("c:flowers").stage) / "flowers" / "train"
    stage.mkdir(parents=True)
    (stage / "old.png").write_bytes(b"old")

    sent(folder, "c:flowers", Shell())

    assert contents(claim / "flowers") == contents(folder)


def test_a_file_that_changes_on_its_way_is_never_committed(claim: Path, folder: Path) -> None:
    target = parse_target("c:flowers")
    items = scan(folder, target)
    victim = next(folder.rglob("*.png"))
    victim.write_bytes(bytes(victim.stat().st_size))

    with pytest.raises(ClusterError, match="did they change"):
        push(items, target, Shell(), replace=False)
    assert not (claim / "flowers").exists()

    victim.write_bytes(b"shorter")
    with pytest.raises(SpecError, match="has changed"):
        push(items, target, Shell(), replace=False)


def test_links_inside_stay_links_and_links_to_files_elsewhere_become_files(
    claim: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere.png").write_bytes(b"from elsewhere")
    (folder / "train" / "a.png").symlink_to(tmp_path / "elsewhere.png")
    (folder / "train" / "b.png").symlink_to("ein Gänseblümchen/0 $x'.png")

    sent(folder, "c:flowers", Shell())

    train = claim / "flowers" / "train"
    assert (train / "a.png").read_bytes() == b"from elsewhere"
    assert not (train / "a.png").is_symlink()
    assert str((train / "b.png").readlink()) == "ein Gänseblümchen/0 $x'.png"
    assert sent(folder, "c:flowers", Shell()) == []


def test_a_long_name_and_a_large_file_arrive(claim: Path, tmp_path: Path) -> None:
    deep = tmp_path / "d" / ("x" * 120) / ("y" * 120)
    deep.mkdir(parents=True)
    (deep / "large").write_bytes(os.urandom(3 * CHUNK + 1))
    (deep / "empty").write_bytes(b"")

    sent(tmp_path / "d", "c", Shell())

    assert contents(claim) == contents(tmp_path / "d")


def test_the_size_that_the_pod_reads_is_the_size_of_the_stream(folder: Path) -> None:
    items = scan(folder, Target(claim="c"))

    assert tar_size(items) == sum(map(len, tar_stream(items)))
    assert [item for batch in batches(items) for item in batch] == items
    assert tops(items) == ["train", "val"]


@pytest.mark.parametrize("text", ["", ":a", "c:/a", "c:../a", "c:a/../../b"])
def test_a_target_lies_inside_a_claim(text: str) -> None:
    with pytest.raises(SpecError):
        parse_target(text)


def test_what_cannot_be_sent_is_named_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such folder"):
        scan(tmp_path / "nothing", Target(claim="c"))
    with pytest.raises(SpecError, match="holds no file"):
        scan(tmp_path, Target(claim="c"))
    (tmp_path / "a\nb").write_bytes(b"")
    (tmp_path / "out").symlink_to("/usr")
    with pytest.raises(SpecError) as found:
        scan(tmp_path, Target(claim="c"))
    assert len(found.value.faults) == 2


# --- the pod --------------------------------------------------------------------------------------


class Api:
    """A core API whose pod runs at the second look; `claims` that there are."""

    def __init__(self, *claims: str, phase: str = "Running") -> None:
        self.claims, self.phase = claims, phase
        self.made: list[dict[str, Any]] = []
        self.deleted: list[str] = []

    def read_namespaced_persistent_volume_claim(self, name: str, _namespace: str) -> None:
        from kubernetes.client import ApiException

        if name not in self.claims:
            raise ApiException(status=404, reason="Not Found")

    def create_namespaced_pod(self, _namespace: str, body: dict[str, Any]) -> None:
        self.made.append(body)

    def delete_namespaced_pod(self, name: str, _namespace: str, **_options: Any) -> None:
        self.deleted.append(name)

    def read_namespaced_pod(self, _name: str, _namespace: str) -> Any:
        from kubernetes.client import V1PodCondition, V1PodStatus

        class Found:
            status = V1PodStatus(
                phase=self.phase,
                conditions=[
                    V1PodCondition(type="PodScheduled", status="False", message="no node has room")
                ],
            )

        return Found


@pytest.mark.parametrize("ending", [KeyboardInterrupt, ClusterError("x"), None])
def test_the_pod_is_deleted_however_a_push_ends(ending: Any) -> None:
    api = Api("datasets")

    def use() -> None:
        with pod_on(api, "vision", Target(claim="datasets"), image="i", wait=1):
            if ending is not None:
                raise ending

    if ending is None:
        use()
    else:
        with pytest.raises(ending if isinstance(ending, type) else type(ending)):
            use()

    assert api.deleted == [api.made[0]["metadata"]["name"]]


def test_a_pod_that_cannot_be_deleted_hides_no_error_and_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from kubernetes.client import ApiException

    api = Api("datasets")

    def refuse(*_: Any, **__: Any) -> None:
        raise ApiException(status=500, reason="away")

    api.delete_namespaced_pod = refuse  # type: ignore[method-assign]

    with (
        pytest.raises(KeyboardInterrupt),
        pod_on(api, "vision", Target(claim="datasets"), image="i", wait=1),
    ):
        raise KeyboardInterrupt

    assert f"delete pod {api.made[0]['metadata']['name']}" in capsys.readouterr().err


def test_a_pod_that_does_not_run_is_given_up_with_the_schedulers_words() -> None:
    api = Api("datasets", phase="Pending")

    with (
        pytest.raises(ClusterError, match="no node has room"),
        pod_on(api, "vision", Target(claim="datasets"), image="i", wait=0),
    ):
        pass

    assert len(api.deleted) == 1


def test_a_claim_that_is_not_there_is_named_and_no_pod_is_made() -> None:
    api = Api()

    with (
        pytest.raises(NotFoundError, match=r"datasets.*namespace vision"),
        pod_on(api, "vision", Target(claim="datasets"), image="i", wait=1),
    ):
        pass

    assert api.made == []


def test_the_pod_asks_for_nothing_that_restricted_forbids() -> None:
    spec = build_pod("p", Target(claim="datasets"), "busybox")["spec"]

    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["automountServiceAccountToken"] is False
    (container,) = spec["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_the_servers_refusal_is_told_in_its_words() -> None:
    from kubernetes.client import ApiException

    error = ApiException(status=403, reason="Forbidden")
    error.body = '{"message": "pods is forbidden: you may not"}'

    with pytest.raises(ClusterError, match="you may not"), api_errors():
        raise error


def test_a_ctrl_c_that_the_client_wraps_stays_one() -> None:
    from kubernetes.client import ApiException

    def call() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ApiException(status=0, reason=str(error))  # noqa: B904  # as the client does

    with pytest.raises(KeyboardInterrupt), api_errors():
        call()


def test_without_a_cluster_the_verb_exits_69(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setattr("signal.signal", lambda *_: None)

    code = main(["data", "push", str(folder), "datasets:flowers"])

    assert code == 69
    assert "no access to a cluster" in capsys.readouterr().err
