"""`weights`: fills a folder from a server on this machine; steps then read it without a network."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from weights_server import Behaviour, served

from qtt_core.hub import ModelCard, load_hub
from qtt_core.jobs import JobDocument, Paths, Task
from qtt_core.results import State, StepResult
from qtt_trainer.context import Context
from qtt_trainer.endings import EndedError
from qtt_trainer.fetch import RECORD, Outcome, Source, conclude, fetch, read_record
from qtt_trainer.pretrained import find_weights, missing_weights, package_folder
from qtt_trainer.process import locate, run_job
from qtt_trainer.stopping import Stop

TINY = load_hub("tiny").card("mini_resnet")
CARD = dataclasses.replace(TINY, tag="test_resnet.r160_in1k", weights="hub", licence="apache-2.0")
OTHER = dataclasses.replace(CARD, name="other", tag="test_vit.r160_in1k")
CONTENT = (package_folder() / "test_resnet.safetensors").read_bytes()
PATH = f"/timm/{CARD.tag}/resolve/main/model.safetensors"


@pytest.fixture
def hub(tmp_path: Path) -> Behaviour:
    """A server's folder that holds the weights of `CARD`."""
    put(tmp_path / "served", CARD, CONTENT)
    return Behaviour(folder=tmp_path / "served")


@pytest.fixture
def endpoint(hub: Behaviour) -> Iterator[str]:
    with served(hub) as url:
        yield url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def put(root: Path, card: ModelCard, content: bytes) -> Path:
    path = root / "timm" / card.tag / "resolve" / "main" / "model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def only(outcomes: list[Outcome]) -> Outcome:
    assert len(outcomes) == 1
    return outcomes[0]


@pytest.mark.parametrize("commit", ["", "c0ffee" * 6])
def test_a_step_finds_offline_what_was_fetched(hub, endpoint, folder, commit):
    hub.commit = commit

    found = only(fetch([CARD], folder, Source(endpoint=endpoint)))

    assert found.state == "fetched"
    assert {path.removesuffix(".sha256") for _, path, *_ in hub.asked} == {PATH}
    assert find_weights(CARD, str(folder)).read_bytes() == CONTENT
    assert find_weights(CARD, str(folder)).parent.name == (
        commit or hashlib.sha256(CONTENT).hexdigest()[:40]
    )
    assert missing_weights([CARD, OTHER], str(folder)) == ["other"]


def test_timm_builds_a_model_from_the_folder_without_a_network(hub, endpoint, folder):
    from qtt_trainer.model import BuildRequest, build_model

    fetch([CARD], folder, Source(endpoint=endpoint))
    hub.asked.clear()

    built = build_model(
        BuildRequest(card=CARD, num_classes=3, img_size=32, weights_cache=str(folder), offline=True)
    )

    assert built.weights_sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert hub.asked == []


def test_the_record_says_what_came_from_where(endpoint, folder):
    fetch([CARD], folder, Source(endpoint=endpoint))

    entry = read_record(folder)[CARD.name]

    assert entry["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert entry["bytes"] == len(CONTENT)
    assert entry["licence"] == "apache-2.0"
    assert entry["endpoint"] == endpoint


def test_what_is_there_is_neither_asked_for_nor_written(hub, endpoint, folder):
    fetch([CARD], folder, Source(endpoint=endpoint))
    hub.asked.clear()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    found = only(fetch([CARD], folder, Source(endpoint="http://127.0.0.1:1")))

    assert found.state == "present"
    assert hub.asked == []
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("etag", [False, True])
def test_an_interrupted_download_goes_on_where_it_broke_off(hub, endpoint, folder, etag):
    hub.etag, hub.break_after = etag, 100_000
    broken = only(fetch([CARD], folder, Source(endpoint=endpoint)))

    done = only(fetch([CARD], folder, Source(endpoint=endpoint)))

    assert broken.error.state is State.WEIGHTS_UNAVAILABLE
    assert "broke off after 100000 bytes" in broken.error.reason
    assert done.state == "fetched"
    assert hub.bodies() == [(PATH, ""), (PATH, "bytes=100000-")]
    assert find_weights(CARD, str(folder)).read_bytes() == CONTENT


def test_a_whole_part_of_a_killed_process_is_not_fetched_again(hub, endpoint, folder):
    part = folder / f"models--timm--{CARD.tag}" / "blobs" / "model.safetensors.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT)

    found = only(fetch([CARD], folder, Source(endpoint=endpoint)))

    assert found.state == "fetched"
    assert find_weights(CARD, str(folder)).read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_thrown_away(endpoint, folder):
    part = folder / f"models--timm--{CARD.tag}" / "blobs" / "model.safetensors.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT + b"rest of another version")

    first = only(fetch([CARD], folder, Source(endpoint=endpoint)))
    second = only(fetch([CARD], folder, Source(endpoint=endpoint)))

    assert first.error is not None
    assert second.state == "fetched"


@pytest.mark.parametrize(
    ("content", "told", "words"),
    [
        (b"<html>please log in</html>" * 9, "", "no safetensors file"),
        (CONTENT[:-1], "", f"has {len(CONTENT) - 1} bytes of {len(CONTENT)}"),
        (CONTENT, "0" * 64, "published is 000000000000"),
    ],
    ids=["a page", "one byte short", "another digest"],
)
def test_what_is_not_the_published_file_is_deleted_and_named(
    hub, endpoint, folder, content, told, words
):
    path = put(hub.folder, CARD, content)
    if told:
        path.with_name(path.name + ".sha256").write_text(f"{told}  {path.name}\n")

    found = only(fetch([CARD], folder, Source(endpoint=endpoint)))

    assert found.error.state is State.WEIGHTS_CORRUPT
    assert words in found.error.reason
    assert find_weights(CARD, str(folder)) is None
    assert not list(folder.rglob("*.incomplete"))


def test_damage_on_the_volume_is_seen_and_repaired(endpoint, folder):
    fetch([CARD], folder, Source(endpoint=endpoint))
    blob = find_weights(CARD, str(folder)).resolve()
    blob.write_bytes(CONTENT[:-9])
    shorter = only(fetch([CARD], folder, Source(endpoint=endpoint)))
    blob.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))

    quick = only(fetch([CARD], folder, Source(endpoint=endpoint)))
    thorough = only(fetch([CARD], folder, Source(endpoint=endpoint), verify=True))

    assert [shorter.state, quick.state, thorough.state] == ["fetched", "present", "fetched"]
    assert find_weights(CARD, str(folder)).read_bytes() == CONTENT


def test_one_model_that_is_not_there_stops_no_other(endpoint, folder):
    outcomes = fetch([OTHER, CARD], folder, Source(endpoint=endpoint))
    end = conclude(outcomes)

    assert [outcome.state for outcome in outcomes] == ["failed", "fetched"]
    assert end.exit_code == 64
    assert end.reason.startswith("no weights for other (1 of 2): ")
    assert "answered 404" in end.reason


@pytest.mark.parametrize(("status", "code"), [(401, 64), (403, 64), (429, 75), (503, 75)])
def test_the_servers_answer_decides_whether_a_retry_helps(hub, endpoint, folder, status, code):
    hub.status[PATH] = status

    end = conclude(fetch([CARD], folder, Source(endpoint=endpoint)))

    assert end.exit_code == code
    assert f"answered {status}" in end.reason


def test_a_closed_network_is_named_once_with_host_and_remedy(folder):
    end = conclude(fetch([CARD, OTHER], folder, Source(endpoint="http://127.0.0.1:1")))

    assert end.state is State.WEIGHTS_UNAVAILABLE
    assert end.exit_code == 75
    assert f"{CARD.name}, other (2 of 2): 127.0.0.1:1 cannot be reached" in end.reason
    assert "open egress" in end.reason


def test_a_token_comes_from_a_file_and_from_nowhere_else(
    hub, endpoint, folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "of-the-shell")
    (tmp_path / "token").write_text("of-the-file\n")
    fetch([CARD], folder / "a", Source(endpoint=endpoint))
    without = {token for *_, token in hub.asked}
    hub.asked.clear()

    fetch([CARD], folder / "b", Source(endpoint=endpoint, token_file=str(tmp_path / "token")))

    assert without == {""}
    assert {token for *_, token in hub.asked} == {"Bearer of-the-file"}


def test_an_unreadable_token_file_is_the_users_mistake(endpoint, folder):
    with pytest.raises(EndedError, match="token file"):
        fetch([CARD], folder, Source(endpoint=endpoint, token_file="/nowhere/token"))


def test_shipped_weights_need_no_server(folder):
    assert fetch([TINY], folder, Source(endpoint="http://127.0.0.1:1")) == []
    assert not folder.exists()


def test_hundreds_of_names_fit_a_reason():
    error = EndedError(State.WEIGHTS_UNAVAILABLE, "why")
    cards = [dataclasses.replace(CARD, name=f"model_{n:03d}_{'x' * 40}") for n in range(256)]

    end = conclude([Outcome(card=card, state="failed", error=error) for card in cards])

    assert len(end.reason) < 600
    assert "… (256 of 256): why" in end.reason


def test_the_job_answers_by_its_message_and_leaves_nothing_else(
    hub, endpoint, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    document = JobDocument(
        run_uid="r", attempt=0, nonce="n", task=Task(data="/data"),
        paths=Paths(root="/nowhere/checkpoints", weights=str(folder)),
        cards=(CARD.to_json(), TINY.to_json()),
    ).to_json()  # fmt: skip
    texts: list[str] = []

    code = run_job(
        locate("weights", document), document, Context(stop=Stop(), born=0.0), texts.append
    )

    message = StepResult.parse(texts[-1], nonce="n", attempt=0)
    assert (code, message.state, message.reason) == (0, State.OK, "")
    assert find_weights(CARD, str(folder)) is not None


def test_the_command_prints_one_line_of_facts(hub, endpoint, folder, tmp_path):
    cards = {"cards": [{**CARD.to_json(), "default": True}, {**OTHER.to_json(), "default": False}]}
    (tmp_path / "own.json").write_text(json.dumps(cards))
    words = ["weights", "--hub", str(tmp_path / "own.json"), "--to", str(folder)]

    done = subprocess.run(
        [sys.executable, "-m", "qtt_trainer", *words],
        env={**os.environ, "HF_ENDPOINT": endpoint}, capture_output=True, text=True, check=False,
    )  # fmt: skip

    facts = json.loads(done.stdout)
    assert done.returncode == 64
    assert [(m["name"], m["state"]) for m in facts["models"]] == [
        (CARD.name, "fetched"), ("other", "failed"),
    ]  # fmt: skip
    assert f"1 of 2: {CARD.name}: fetched" in done.stderr
    assert (folder / RECORD).is_file()
