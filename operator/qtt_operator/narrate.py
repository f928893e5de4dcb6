"""Tells a run in single lines: one per decision and result, with what was predicted and what came.

Used for plain output and for the run's log file. Pure: an event and what was known when it came.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qtt_core.ledger.events import (
    Cancel,
    Close,
    Done,
    Event,
    Fail,
    Open,
    Prepared,
    Reopen,
    Retry,
    Run,
    is_pseudo,
)
from qtt_core.ledger.fold import step_epochs
from qtt_core.results import State
from qtt_core.spec import Budget
from qtt_core.steps import Config, Metric, Why
from qtt_operator.report import number, predicted, settings, shown


@dataclass(slots=True, kw_only=True)
class Narrator:
    """Follows one run's events in order. `spent` and `steps` count up as the ledger's fold does."""

    metric: Metric
    budget: Budget
    count: int = 0
    """Events told so far."""
    step: int = 1
    spent: float = 0.0
    steps: int = 0
    best: tuple[float, str, int] | None = None
    """(score, configuration, epoch) of the best single measurement so far."""

    began: dict[str, int] = field(default_factory=dict)
    """Configuration -> epoch at which its open decision began."""

    def line(self, event: Event, configs: Mapping[str, Config]) -> str:
        """One line for an event, empty where there is nothing to say."""
        self.count += 1
        match event:
            case Run():
                self.step = step_epochs(event)
                return f"run {event.name}: {event.algorithm}, seed {event.seed}"
            case Prepared():
                return self._prepared(event)
            case Open():
                return self._opened(event, configs)
            case Done():
                return self._done(event)
            case Fail():
                self.steps += 1
                self.spent += event.dev
                return f"c{event.c} {event.state}: {_first_line(event.msg)}{self._used()}"
            case Retry():
                return self._retry(event)
            case Cancel():
                return self._cancelled(event)
            case Reopen():
                return f"going on: {event.reason}"
            case Close():
                return f"ended: {event.reason} {event.msg}".rstrip()
        return ""

    def so_far(self) -> str:
        """One line for everything told: what a run that goes on already has."""
        best = "no score yet"
        if self.best is not None:
            score, c, epoch = self.best
            value = shown(self.metric.to_value(score), self.metric)
            best = f"best {self.metric.name} {value} by c{c} at epoch {epoch}"
        return f"going on where the run stopped: {best}{self._used()}"

    def _prepared(self, event: Prepared) -> str:
        self.spent += event.dev
        text = f"data: {event.n_train} train + {event.n_val} val images, {event.classes} classes"
        excluded = sum(event.excluded.values())
        if excluded:
            text += f", {excluded} unreadable images left out"
        return "; ".join((text, *event.warnings))

    def _opened(self, event: Open, configs: Mapping[str, Config]) -> str:
        if is_pseudo(event.c):
            return f"{event.c}: reading the data set" if event.c == "prepare" else ""
        self.began[event.c] = event.frm
        config = configs.get(event.c, {})
        why = Why.from_json(event.why)
        facts = []
        if why.mean is not None:
            facts.append(f"predicted {predicted(why, self.metric)}")
        if why.cost_seconds is not None:
            facts.append(f"~{number(why.cost_seconds, 2)} s")
        if why.rank is not None and why.pool is not None:
            facts.append(f"rank {why.rank} of {why.pool}")
        if why.rule:
            facts.append(why.rule)
        epochs = (
            f"epoch {event.frm + 1}"
            if event.to == event.frm + 1
            else f"epochs {event.frm + 1}-{event.to}"
        )
        what = f"{config.get('model', '?')} ({settings(config)})"
        return f"c{event.c} {epochs}: {what}; {', '.join(facts)}"

    def _done(self, event: Done) -> str:
        self.steps += event.steps(self.began.get(event.c, 0), self.step)
        self.spent += event.dev
        seconds = sum(s for _, _, s in event.epochs)
        if event.state == State.DIVERGED:
            return f"c{event.c} diverged after {len(event.epochs)} good epochs{self._used()}"
        epoch, score, _ = event.epochs[-1]
        top_epoch, top, _ = max(event.epochs, key=lambda e: e[1])
        record = self.best is None or top > self.best[0]
        if record:
            self.best = (top, event.c, top_epoch)
        value = shown(self.metric.to_value(score), self.metric)
        text = f"c{event.c} epoch {epoch}: {self.metric.name} {value} in {seconds:.1f} s"
        if record:
            text += "  * best so far"
        elif self.best is not None:
            best = shown(self.metric.to_value(self.best[0]), self.metric)
            text += f"  (best {best} by c{self.best[1]})"
        return text + self._used()

    def _retry(self, event: Retry) -> str:
        self.spent += event.dev
        return f"{_who(event.c)} again, attempt {event.a + 1}: {_why(event)}"

    def _cancelled(self, event: Cancel) -> str:
        self.spent += event.dev
        if event.reason == State.BAD_DATA:
            return ""  # the close that follows says it
        return f"{_who(event.c)} {'given up' if event.retire else 'put back'}: {_why(event)}"

    def _used(self) -> str:
        """How much of the budget is used: `  [step 12 of 60, 31 of 180 s]`."""
        parts = []
        if self.budget.max_steps is not None:
            parts.append(f"step {self.steps} of {self.budget.max_steps}")
        else:
            parts.append(f"step {self.steps}")
        if self.budget.max_gpu_seconds is not None:
            parts.append(f"{self.spent:.0f} of {self.budget.max_gpu_seconds:.0f} device-s")
        else:
            parts.append(f"{self.spent:.0f} device-s")
        return f"  [{', '.join(parts)}]"


def _who(c: str) -> str:
    return c if is_pseudo(c) else f"c{c}"


def _why(event: Retry | Cancel) -> str:
    """Reason and message; the message alone says nothing new where it repeats the reason."""
    message = _first_line(event.msg)
    return event.reason if message in {"", event.reason} else f"{event.reason} {message}"


def _first_line(text: str) -> str:
    line = text.strip().splitlines()[-1] if text.strip() else ""
    return line[:300]
