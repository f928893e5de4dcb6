"""Which prior a run searches with: chosen at its start, kept to the end. Pure but for small reads.

Used by `qtt run` and the operator alike; loads no arrays, which is the optimizer worker's part.
"""

from __future__ import annotations

from dataclasses import dataclass

from qtt_core.catalogue import FIELD, choose, kept
from qtt_core.errors import SpecDriftError
from qtt_core.hub import Hub
from qtt_core.ledger.fold import LedgerState
from qtt_core.spec import TuningRun


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorChoice:
    """`prior`: as in the event `Run`, empty = cold. `line`: news for a person, empty = none."""

    prior: str = ""
    line: str = ""


def choose_prior(run: TuningRun, hub: Hub, state: LedgerState, own: str) -> PriorChoice:
    """The recorded prior of a run that has started, else what its manifest means.

    A shipped prior that a newer version brought takes the recorded one's place, and it is said; one
    of the folder `own` must not change under a run. Raises: SpecError; SpecDriftError.
    """
    if state.run is None:
        algorithm, portfolio = run.spec.optimizer.algorithm, run.spec.search.portfolio
        chosen = choose(portfolio, algorithm=algorithm, hub=hub, own=own)
        return PriorChoice() if chosen is None else PriorChoice(prior=str(chosen), line=chosen.line)
    found, same = kept(state.run.prior, own)
    if found is None or same:
        return PriorChoice(prior=state.run.prior)
    if found.own:
        remedy = "put it back, or give the new one another name and start another run"
        raise SpecDriftError([f"the prior of {FIELD}"], remedy)
    line = f"prior {found.name} differs from the recorded one: newer code; proposals may differ"
    return PriorChoice(prior=str(found), line=line)
