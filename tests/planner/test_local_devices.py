"""Which devices a local run uses, as tables."""

import pytest

from qtt_core.errors import SpecError
from qtt_operator.devices import (
    count_cores,
    default_devices,
    make_slots,
    parse_devices,
    visible_count,
)


@pytest.mark.parametrize(
    ("text", "cuda", "devices"),
    [
        ("cpu", 0, ("cpu",)),
        ("cpu:3", 0, ("cpu", "cpu", "cpu")),
        ("cuda:1", 2, ("cuda:1",)),
        ("cuda:0,cuda:1", 2, ("cuda:0", "cuda:1")),
        ("cuda", 2, ("cuda:0", "cuda:1")),
        ("cuda:0, cpu:1", 1, ("cuda:0", "cpu")),
    ],
)
def test_devices_are_read_as_written(text, cuda, devices):
    assert parse_devices(text, cuda) == devices


@pytest.mark.parametrize(
    ("text", "cuda", "says"),
    [
        ("gpu", 1, "use cuda"),
        ("", 1, "use cuda"),
        ("cpu:-1", 1, "use cuda"),
        ("cpu:0", 1, "names 0 devices"),
        ("cuda", 0, "names 0 devices"),
        ("cpu:99999999999", 0, "names 513 devices"),
        ("cuda:0,cuda:0", 1, "twice"),
        ("cuda:2", 2, "shows 2 CUDA devices"),
    ],
)
def test_devices_that_cannot_be_used_are_refused_with_the_reason(text, cuda, says):
    with pytest.raises(SpecError, match=says) as refused:
        parse_devices(text, cuda)

    assert refused.value.faults[0].field == "--devices"


@pytest.mark.parametrize(
    ("parallelism", "cores", "cuda", "devices"),
    [
        (1, 8, 0, ("cpu",)),
        (4, 2, 0, ("cpu", "cpu")),
        (2, 8, 4, ("cuda:0", "cuda:1")),
        (8, 8, 2, ("cuda:0", "cuda:1")),
        (0, 8, 0, ("cpu",)),
    ],
)
def test_default_devices_are_cuda_first_and_no_more_than_the_run_uses(
    parallelism, cores, cuda, devices
):
    assert default_devices(parallelism, cores, cuda) == devices


@pytest.mark.parametrize(
    ("visible", "count"),
    [("", 0), ("-1", 0), ("0", 1), ("0,2", 2), ("0,-1,2", 1), ("GPU-1a,GPU-2b", 2)],
)
def test_cuda_visible_devices_hides_what_it_does_not_name(visible, count):
    assert visible_count(visible) == count


def test_slots_share_the_cores_and_never_get_none():
    assert [slot.threads for slot in make_slots(("cpu", "cpu"), 8)] == [4, 4]
    assert [slot.threads for slot in make_slots(("cpu",) * 3, 2)] == [1, 1, 1]
    assert count_cores() >= 1
