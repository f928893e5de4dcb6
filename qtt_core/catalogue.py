"""Which prior a manifest's `search.portfolio` means: names, folders and digests, no arrays.

Read by whoever starts a run, and by the optimizer worker, which loads what was chosen. A prior is a
folder that `MetaPrior.save` wrote: shipped inside the package, or by name in the folder of priors
that an install or a person keeps. A run records name and digest at its start and keeps to them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtt_core.errors import Fault, NotFoundError, SpecError
from qtt_core.hub import Hub

FIELD = "spec.search.portfolio"
AUTO, NONE = "Auto", "None"
SHIPPED = Path(__file__).parent / "data" / "priors"
CARD = "card.json"
PREFIX = "mtlbm/"
"""What the published tool writes before the names of its pretrained optimizers."""

STAND_INS: Mapping[str, str] = {"mini": "micro", "extended": "micro"}
"""Regimes without a prior of their own, and the shipped one that speaks for them."""

LEARNERS = frozenset({"QuickTune", "QuickTunePaper", "Portfolio"})
"""Algorithms that read a prior; others never load one."""

_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorRef:
    """A prior that a run uses; as text `<name>@<sha>`, own ones `own/<name>@<sha>`."""

    name: str
    sha: str
    """SHA-256 of its card, which holds the digest of its arrays."""
    own: bool = False
    line: str = ""
    """What a person should know of the choice; not part of its identity."""

    def __str__(self) -> str:
        return f"{'own/' if self.own else PREFIX}{self.name}@{self.sha}"

    @staticmethod
    def parse(text: str) -> PriorRef:
        """The inverse of `str`."""
        where, _, rest = text.partition("/")
        name, _, sha = rest.rpartition("@")
        return PriorRef(name=name, sha=sha, own=where == "own")

    def folder(self, own: str | Path) -> Path:
        """Where it lies; `own`: the folder of own priors."""
        return Path(own) / self.name if self.own else SHIPPED / self.name


def shipped_names() -> tuple[str, ...]:
    """Names of the priors in the package."""
    return tuple(sorted(path.parent.name for path in SHIPPED.glob(f"*/{CARD}")))


def own_names(folder: str | Path) -> tuple[str, ...]:
    """Names of the priors in a folder; none if there is no such folder, or no name of one."""
    if not folder:
        return ()
    return tuple(sorted(path.parent.name for path in Path(folder).glob(f"*/{CARD}")))


def choose(portfolio: str, *, algorithm: str, hub: Hub, own: str | Path = "") -> PriorRef | None:
    """The prior of a run that starts now; None: it starts cold.

    `own`: the folder of own priors, empty if there is none. Raises: NotFoundError for an unknown
    name, with the known ones; SpecError for a prior that is damaged.
    """
    if portfolio == NONE or algorithm not in LEARNERS:
        return None
    if portfolio == AUTO:
        return _automatic(hub)
    name = portfolio.removeprefix(PREFIX)
    if name in own_names(own) and portfolio == name and _lies_in(Path(own), name):
        line = f"prior {name}, of the folder of priors"
        return PriorRef(name=name, sha=card_sha(Path(own) / name), own=True, line=line)
    stand_in = STAND_INS.get(name, name)
    if stand_in not in shipped_names():
        raise NotFoundError([Fault(FIELD, portfolio, _remedy(own))])
    line = f"prior {PREFIX}{stand_in}"
    if stand_in != name:
        line += (
            f" in place of {PREFIX}{name}, which has no meta-data of its own yet; "
            "its seconds follow this data set's number of images"
        )
    return PriorRef(name=stand_in, sha=card_sha(SHIPPED / stand_in), line=line)


def kept(recorded: str, own: str | Path = "") -> tuple[PriorRef | None, bool]:
    """The prior of a run that has started, and whether it is still the recorded one.

    A run that recorded none started cold and stays cold. Raises: NotFoundError if it is gone.
    """
    if not recorded:
        return None, True
    ref = PriorRef.parse(recorded)
    if not (ref.folder(own) / CARD).is_file():
        remedy = f"the run began with it; put it back. {_remedy(own)}"
        raise NotFoundError([Fault(FIELD, ref.name, remedy)])
    sha = card_sha(ref.folder(own))
    return PriorRef(name=ref.name, sha=sha, own=ref.own), sha == ref.sha


def _automatic(hub: Hub) -> PriorRef | None:
    """The shipped prior that knows most of a hub's models, if that is half of them or more."""
    models = {card.name for card in hub.cards}
    known = {name: len(models & _models(SHIPPED / name)) for name in shipped_names()}
    best = max(known, key=lambda name: (known[name], name), default=None)
    if best is None or 2 * known[best] < len(models):
        return None
    line = f"prior {PREFIX}{best}: knows {known[best]} of {len(models)} models"
    return PriorRef(name=best, sha=card_sha(SHIPPED / best), line=line)


def _models(folder: Path) -> set[str]:
    hub = _card(folder).get("hub") or {}
    return {str(card["name"]) for card in hub.get("cards", ())}


def _card(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error
    if not isinstance(found, dict):
        raise _damaged(folder, "no JSON object")
    return found


def card_sha(folder: Path) -> str:
    """What a prior is known by. Raises: SpecError if its card cannot be read."""
    try:
        return hashlib.sha256((folder / CARD).read_bytes()).hexdigest()
    except OSError as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, why: object) -> SpecError:
    return SpecError([Fault(FIELD, folder.name, f"its {CARD} cannot be read: {why}")])


def is_name(text: str) -> bool:
    """Whether a prior may be called so."""
    return _NAME.fullmatch(text) is not None


def _lies_in(own: Path, name: str) -> bool:
    """Whether a name is one, and no way out of the folder (a link, say)."""
    return is_name(name) and (own / name).resolve().is_relative_to(own.resolve())


def _remedy(own: str | Path) -> str:
    shipped = ", ".join(dict.fromkeys((*shipped_names(), *STAND_INS)))
    mine = ", ".join(own_names(own)) or "none"
    return (
        f"use {AUTO}, {NONE}, {shipped} or a prior of the folder of priors (there: {mine}); "
        "`qtt metatrain` makes one"
    )
