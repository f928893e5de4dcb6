"""Whatever is thrown at manifests, overrides and configurations: a SpecError or a sound result."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtt_core.errors import Fault, SpecError
from qtt_core.hub import load_hub, parse_hub
from qtt_core.space import SPACES, build_space, check_values
from qtt_core.spec import cluster_only_fields, immutable_digest, parse_manifest, scan_manifest
from qtt_operator.manifest_file import scan_text

HUB = load_hub("timm24")
FULL: dict[str, Any] = {
    "apiVersion": "quicktune.dev/v1alpha1",
    "kind": "TuningRun",
    "metadata": {"name": "birds", "namespace": "vision", "annotations": {"a": "b"}},
    "spec": {
        "dataset": {"claimName": "d", "autoSplit": "0.2", "metaFeatures": {"n": "1"}},
        "search": {
            "space": "native",
            "hubRef": {"name": "h"},
            "models": ["a"],
            "modelLimits": {"maxGMACs": "60", "licences": ["mit"]},
            "initialConfigs": [{"lr": "1e-3"}],
            "overrides": {"amp": "true"},
        },
        "objective": {"metric": "top1", "goal": "0.9"},
        "fidelity": {"max": 50, "step": 1, "stepsPerJob": 5},
        "optimizer": {"algorithm": "QuickTune", "seed": 7, "timeout": "1m"},
        "budget": {"maxSteps": 3, "maxWallclock": "4h"},
        "checkpoint": {
            "volumeClaimTemplate": {
                "accessModes": ["ReadWriteMany"],
                "resources": {"requests": {"storage": "1Gi"}},
            }
        },
        "failurePolicy": {"stepTimeout": "40m"},
        "template": {
            "metadata": {"labels": {"a": "b"}},
            "spec": {"containers": [{"name": "trainer", "resources": {"limits": {"x/gpu": 1}}}]},
        },
    },
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def attempt(call: Callable[..., Any], *args: object, **kwargs: object) -> tuple[Any, list[Fault]]:
    """The result, or None and the faults; any other error fails the test."""
    try:
        return call(*args, **kwargs), []
    except SpecError as error:
        return None, list(error.faults)


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a nested value."""
    if path:
        yield path
    items = (
        value.items()
        if isinstance(value, Mapping)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from places(item, (*path, key))


def with_value(path: tuple[Any, ...], value: object) -> dict[str, Any]:
    raw = copy.deepcopy(FULL)
    target: Any = raw
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return raw


def test_the_full_manifest_of_these_tests_is_sound() -> None:
    assert scan_manifest(FULL)[1] == []


@given(path=st.sampled_from(list(places(FULL))), value=JSON)
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_any_value_anywhere_is_a_fault_or_a_run(path: tuple[Any, ...], value: object) -> None:
    raw = with_value(path, value)

    run, faults = attempt(parse_manifest, raw)
    if run is None:
        assert faults
        assert all(fault.field and fault.expected and str(fault) for fault in faults)
        return

    json.dumps(run.raw_spec, allow_nan=False)
    assert immutable_digest(run.raw_spec)
    assert isinstance(cluster_only_fields(run), list)
    again = parse_manifest({**raw, "spec": run.raw_spec})
    assert again.spec == run.spec
    assert again.raw_spec == run.raw_spec


@given(raw=JSON)
def test_any_json_is_a_fault_or_a_run_or_a_hub(raw: object) -> None:
    with pytest.raises(SpecError):
        parse_manifest(raw)
    with pytest.raises(SpecError):
        parse_hub("mine", raw)


@given(text=st.text(max_size=60) | st.text(alphabet="ab:-[]{}&*!|>'\"#,?% \t\n0.", max_size=60))
@settings(max_examples=300)
def test_any_text_is_a_fault_or_a_document(text: str) -> None:
    read, faults = attempt(scan_text, text, "f.yaml")
    assert all(fault.field.startswith("f.yaml") for fault in faults)
    if read is None:
        return
    document, double = read

    if not double:  # where nothing is special, PyYAML reads the same structure
        assert type(document) is type(yaml.safe_load(text)) or not isinstance(document, dict | list)


LEGAL = {
    name: {
        axis: build_space(name, HUB, max_fidelity=5).legal(axis) or ()
        for axis in build_space(name, HUB, max_fidelity=5).names
    }
    for name in SPACES
}


@st.composite
def overrides(draw: st.DrawFn) -> tuple[str, dict[str, str]]:
    """A space and legal overrides of up to six axes."""
    space = draw(st.sampled_from(SPACES))
    names = draw(st.lists(st.sampled_from(sorted(LEGAL[space])), max_size=6, unique=True))
    chosen = {}
    for name in names:
        values = draw(st.lists(st.sampled_from(LEGAL[space][name]), min_size=1, max_size=3))
        chosen[name] = ",".join(str(value) for value in values)
    return space, chosen


@given(case=overrides(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
def test_under_any_overrides_every_configuration_is_sound(
    case: tuple[str, dict[str, str]], seed: int
) -> None:
    name, chosen = case
    space, faults = attempt(build_space, name, HUB, max_fidelity=5, overrides=chosen)
    if space is None:  # nothing else can be wrong with legal values
        assert ["exclude each other" in str(fault) for fault in faults] == [True]
        return
    rng = np.random.default_rng(seed)
    configs = [space.default(), *space.sample(5, rng)]
    configs += space.neighbours(configs[-1], rng, 3)

    for config in configs:
        assert space.canonical(config) == config
        assert check_values(name, config) == config
        for axis, text in chosen.items():
            if axis in config and axis != "opt_betas":
                assert str(config[axis]) in text.split(",")


@given(
    case=st.sampled_from(SPACES),
    config=st.dictionaries(
        st.sampled_from(sorted(LEGAL["native"])) | st.text(max_size=5), JSON, max_size=5
    ),
)
@settings(max_examples=200)
def test_any_configuration_is_named_wrong_or_made_canonical(
    case: str, config: dict[str, object]
) -> None:
    space = build_space(case, HUB, max_fidelity=5)
    for check in (space.canonical, lambda c: check_values(case, c)):
        result, faults = attempt(check, config)
        assert all(fault.field for fault in faults) or "" in config
        if result is not None:
            json.dumps(result, allow_nan=False)
            assert check(result) == result
