"""The words a ledger write answers with; shared by the scripts, the fake and every caller.

A write never raises for these: each word tells the turn what to do next (30-kubernetes 3.2).
"""

from __future__ import annotations

from enum import StrEnum


class Reply(StrEnum):
    """What a ledger script answered (30-kubernetes 3.2)."""

    OK = "OK"
    DUP = "DUP"
    """Recorded before: the caller goes on as after OK."""
    STALE = "STALE"
    """A newer writer has fenced this one off: stop."""
    CLOSED = "CLOSED"
    CONFLICT = "CONFLICT"
    """The config id stands for another configuration."""
    DONE = "DONE"
    """A step of this decision has been committed."""
    BUSY = "BUSY"
    """The configuration has an open decision."""
    GAP = "GAP"
    """The decision does not begin where the configuration ends."""
    UNKNOWN = "UNKNOWN"
    """No such decision is open."""
    OLDATTEMPT = "OLDATTEMPT"
    """Another attempt of this decision is the present one."""
