"""Finished runs as meta-data: what their ledgers say of configurations.

Runs of one search space make one `MetaDataset`; runs on the same images are one data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtt_core.errors import Fault, SpecError
from qtt_core.history import ConfigHistory, Standing, histories
from qtt_core.hub import Hub, ModelCard, load_hub
from qtt_core.ledger.events import Prepared, Run
from qtt_core.ledger.file import Ledger
from qtt_core.ledger.fold import step_epochs
from qtt_core.metadataset import CENSORED, DIVERGED, FAILED, OK, MetaDataset
from qtt_core.space import SearchSpace, build_space

STATES = {
    Standing.FINISHED: OK,
    Standing.DIVERGED: DIVERGED,
    Standing.OOM: FAILED,
    Standing.INFEASIBLE: FAILED,
}
"""What is not here was cut off."""


def from_ledgers(ledgers: Sequence[Ledger]) -> MetaDataset:
    """Every configuration of every run that has a result or a failure.

    Raises: SpecError for runs without a data set, and for runs of different spaces or fidelities.
    """
    told = [_Told.of(ledger) for ledger in ledgers]
    kinds = {(one.space_id, one.ledger.space, one.max_fidelity) for one in told}
    if len(kinds) != 1:
        found = ", ".join(
            f"{one.ledger.name}: {one.space_id}, {one.max_fidelity} epochs" for one in told
        )
        remedy = "one prior learns of one search space and one fidelity.max; train them apart"
        raise SpecError([Fault("ledgers", found or "none", remedy)])
    hub = _together(told)
    rows = [(one, past) for one in told for past in one.pasts if _is_telling(past)]
    return MetaDataset.from_records(
        told[0].space(hub),
        [past.config for _, past in rows],
        [past.scores[: _unbroken(past)] for _, past in rows],
        [past.seconds[: _unbroken(past)] for _, past in rows],
        [one.dataset for one, _ in rows],
        {one.dataset: one.metafeatures for one in told},
        states=[STATES.get(past.standing, CENSORED) for _, past in rows],
        hub=hub,
        source=f"ledgers of {', '.join(one.ledger.name for one in told)}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What a ledger says of its run and its data set."""

    ledger: Ledger
    spec: Mapping[str, Any]
    step: int
    prepared: Prepared
    pasts: Sequence[ConfigHistory]

    @staticmethod
    def of(ledger: Ledger) -> _Told:
        run = next((e for e in ledger.events if isinstance(e, Run)), None)
        prepared = next((e for e in ledger.events if isinstance(e, Prepared)), None)
        if run is None or prepared is None:
            raise SpecError([Fault(ledger.name, "no data set", "the run never read its images")])
        pasts = list(histories(ledger.events, ledger.configs).values())
        return _Told(
            ledger=ledger, spec=run.spec, step=step_epochs(run), prepared=prepared, pasts=pasts
        )

    @property
    def space_id(self) -> str:
        return str(self.spec["search"].get("space") or "custom")

    @property
    def max_fidelity(self) -> int:
        return int(self.spec["fidelity"]["max"])

    @property
    def dataset(self) -> str:
        """Runs on the same images share it, whatever they were called."""
        return f"images-{self.prepared.fingerprint[:12]}"

    @property
    def metafeatures(self) -> dict[str, float]:
        p = self.prepared
        counts = {"n_train": p.n_train, "n_val": p.n_val, "num_classes": p.classes}
        return {name: float(v) for name, v in {**counts, **p.metafeatures}.items()}

    @property
    def cards(self) -> tuple[ModelCard, ...]:
        if self.ledger.hub is not None:
            return Hub.from_json(self.ledger.hub).cards
        if "hubRef" in self.spec["search"]:
            remedy = "its hub is of its own: export the run with this version, which adds it"
            raise SpecError([Fault(self.ledger.name, "hubRef", remedy)])
        return load_hub(str(self.spec["search"].get("hub", "timm24"))).cards

    def space(self, hub: Hub) -> SearchSpace:
        """The whole space: what overrides left out of one run, another may have tried."""
        return build_space(
            self.space_id, hub, max_fidelity=self.max_fidelity, step=self.step,
            definition=self.ledger.space,
            in_channels=int(self.spec["dataset"].get("inChannels", 3)),
        )  # fmt: skip


def _together(told: Sequence[_Told]) -> Hub:
    """All cards of all runs, each name once, in order of first appearance."""
    cards: dict[str, ModelCard] = {}
    for one in told:
        for card in one.cards:
            cards.setdefault(card.name, card)
    return Hub(name="all", cards=tuple(cards.values()))


def _is_telling(past: ConfigHistory) -> bool:
    return bool(past.scores) or past.standing in STATES


def _unbroken(past: ConfigHistory) -> int:
    """Epochs from the first one on without a gap."""
    return sum(epoch == i for i, epoch in enumerate(past.epochs, start=1))
