"""The keys behind every random choice."""

from __future__ import annotations

import pytest

from qtt_trainer.keys import key, key32


def test_a_key_depends_on_its_arguments_alone_and_never_changes_between_versions():
    assert key(0, 3, "perm", 7) == key(0, 3, "perm", 7) == 9090709356599458640


@pytest.mark.parametrize("other", [(1, 3, "perm", 7), (0, 4, "perm", 7), (0, 3, "aug", 7)])
def test_every_argument_changes_the_key(other):
    assert key(*other) != key(0, 3, "perm", 7)


def test_tags_do_not_run_into_each_other():
    assert len({key(1, 23), key(12, 3), key(1, "23"), key(1, 2, 3)}) == 4


def test_keys_fit_the_generators_they_seed():
    keys = [key(0, n, "aug") for n in range(500)]

    assert all(0 <= k < 2**63 for k in keys)
    assert all(0 <= key32(0, n, "aug") < 2**32 for n in range(500))
    assert len(set(keys)) == 500
