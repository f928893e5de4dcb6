"""The pages: every command in them exists, every link leads somewhere, every manifest is valid."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from qtt_core.spec import check_spec, parse_manifest
from qtt_operator.cli import build_parser
from qtt_operator.manifest_file import read_manifest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
FENCE = re.compile(r"^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<target>[^)#\s]+)(#[^)]*)?\)")

VERBS = {
    "kubectl": {
        "annotate", "apply", "create", "delete", "describe", "exec", "get", "label", "logs",
        "patch", "port-forward", "rollout", "scale", "wait",
    },
    "helm": {"install", "rollback", "test", "uninstall", "upgrade"},
    "docker": {"build", "push"},
    "kind": {"create", "load"},
    "minikube": {"start", "image"},
}  # fmt: skip
"""Of programs that are not ours: the verbs our pages use."""

each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
)


def fences(page: Path, *kinds: str) -> Iterator[str]:
    """The code blocks of a page in these languages."""
    for match in FENCE.finditer(page.read_text()):
        if match["kind"] in kinds:
            yield match["text"]


def commands(page: Path) -> list[list[str]]:
    """Each command of a page's shell blocks as words, comments left out."""
    lines = (line for text in fences(page, "sh", "bash") for line in text.splitlines())
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def make_targets() -> set[str]:
    """The targets of the Makefile that `make help` lists."""
    return set(re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


def accept(words: list[str]) -> None:
    """Fail unless this command can be run as it stands."""
    program, *rest = words
    if program == "make":
        targets = [word for word in rest if "=" not in word]
        assert set(targets) <= make_targets(), f"no such target: {words}"
    elif program.endswith("qtt"):
        build_parser().parse_args(rest)
    elif program.endswith("python"):
        assert rest[:2] == ["-m", "pytest"] or (ROOT / rest[0]).is_file(), words
        for word in rest:
            assert not word.startswith("tests/") or (ROOT / word).exists(), words
    elif program in VERBS:
        assert rest[0] in VERBS[program], words
        accept_files_and_values(rest)
    else:
        pytest.fail(f"a page shows a command that no test knows: {words}")


def accept_files_and_values(words: list[str]) -> None:
    """Fail for a file that is not there and for a value that the chart does not have."""
    for option, value in pairwise(words):
        if option in {"-f", "--filename", "--values"} and not value.startswith(
            ("http", "-", "my-")
        ):
            assert (ROOT / value).exists(), words
        if option == "--set":
            found = yaml.safe_load((ROOT / "helm/quicktune-operator/values.yaml").read_text())
            for name in value.partition("=")[0].split("."):
                assert name in found, f"no such value of the chart: {value}"
                found = found[name]
    for word in words:
        assert not word.startswith("helm/") or (ROOT / word).exists(), words


@each_page
def test_every_command_of_a_page_can_be_run(page):
    for words in commands(page):
        accept(words)


@pytest.mark.parametrize(
    "line",
    [
        "make nonsense",
        "qtt frobnicate x",
        "qtt run",
        ".venv/bin/python benchmarks/none.py",
        "kubectl frobnicate x",
        "kubectl apply -f examples/none.yaml",
        "helm install x helm/none",
        "helm upgrade x helm/quicktune-operator --set redis.bundled.enable=false",
        "rm -r x",
    ],
)
def test_a_command_that_does_not_exist_is_noticed(line, capsys):
    with pytest.raises((AssertionError, SystemExit, pytest.fail.Exception)):
        accept(shlex.split(line))


@each_page
def test_every_link_of_a_page_leads_to_a_file(page):
    targets = [match["target"] for match in LINK.finditer(page.read_text())]
    local = [target for target in targets if "://" not in target]

    assert [target for target in local if not (page.parent / target).exists()] == []


@each_page
def test_every_whole_manifest_of_a_page_is_valid(page):
    for text in fences(page, "yaml"):
        if "apiVersion" in text and "{…}" not in text:
            assert check_spec(parse_manifest(yaml.safe_load(text))) == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/**/*.yaml")), ids=lambda p: p.stem)
def test_every_example_is_valid(path):
    run = parse_manifest(read_manifest(path))

    assert (
        check_spec(run) == [] or path.stem == "full"
    )  # sets every field, also those without effect


def test_the_readme_begins_with_two_commands_that_work():
    """Its first screen is what `.ci/run` runs from a clean clone."""
    shown = commands(ROOT / "README.md")[:2]

    assert shown == [["make", "demo"], ["make", "test"]]
    script = (ROOT / ".ci" / "run").read_text()
    assert "make demo" in script
    assert "make test" in script
