"""Two plain Dockerfiles, so that `docker build -f` needs nothing else; they must not drift."""

from __future__ import annotations

import difflib

OWN = (
    "# The ", "#   docker build -f ", "ARG BASE=", "ARG EXTRA=", "ARG TORCH=", "ARG TORCH_INDEX=",
    "LABEL org.opencontainers.image.title=", "ENTRYPOINT ", "CMD ",
)  # fmt: skip


def test_both_images_are_built_alike(root):
    first, second = (
        (root / folder / "Dockerfile").read_text().splitlines()
        for folder in ("operator", "trainer_image")
    )

    differing = [line[2:] for line in difflib.ndiff(first, second) if line[0] in "+-"]

    assert len(differing) == 2 * len(OWN)
    assert [line for line in differing if not line.startswith(OWN)] == []


def test_a_linters_setting_installs_nothing_anew(root):
    """What stands behind the cut of the first stage never decides what is installed."""
    text = (root / "pyproject.toml").read_text()
    kept, mark, cut = text.partition("\n[tool.pytest")

    assert mark
    assert "[project.optional-dependencies]" in kept
    assert "[tool.hatch.build.targets.wheel]" in kept
    assert "[project" not in cut
    assert "[tool.hatch" not in cut


def test_our_code_reaches_an_image_by_copy(root):
    """Buildah 1.28 does not look into what `RUN --mount` mounts: it would keep an older wheel."""
    for folder in ("operator", "trainer_image"):
        text = (root / folder / "Dockerfile").read_text()
        assert "--mount" not in text
        assert "COPY --from=wheel" in text


def test_the_name_of_the_base_may_carry_a_digest(root):
    """Every stage starts from BASE alone, so that one argument pins all of them."""
    for folder in ("operator", "trainer_image"):
        lines = (root / folder / "Dockerfile").read_text().splitlines()
        stages = [line.split()[1] for line in lines if line.startswith("FROM ")]
        assert set(stages) == {"${BASE}", "dependencies"}
        assert "USER 10001:10001" in lines
