"""A run's time to live begins when its status first says that it is over."""

import pytest

from qtt_operator.cluster_status import told_ended

COMPLETE = {"type": "Complete", "status": "True", "lastTransitionTime": "1970-01-01T00:02:00Z"}
FAILED = {"type": "Failed", "status": "True", "lastTransitionTime": "1970-01-01T00:03:00Z"}
REOPENED = {"type": "Complete", "status": "False", "lastTransitionTime": "1970-01-01T00:04:00Z"}


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [([], None), ([COMPLETE], 120), ([REOPENED], None), ([COMPLETE, FAILED], 180)],
    ids=["at work", "complete", "reopened", "failed later"],
)
def test_the_end_is_the_moment_it_was_told(conditions, expected):
    status = {"completionTime": "1970-01-01T00:00:10Z", "conditions": conditions}
    assert told_ended(status) == expected


def test_a_run_without_a_status_has_not_ended():
    assert told_ended({}) is None
