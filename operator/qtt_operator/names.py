"""Every name that people or other programs read: Jobs, condition types and reasons."""

from __future__ import annotations

COMPLETE_REASONS = ("BudgetExhausted", "GoalReached", "GainExhausted", "SpaceExhausted", "Stopped")
FAILED_REASONS = ("TooManyFailedConfigs", "BadData", "CheckpointVolumeLost", "StoreLost")


def job_name(run: str, c: str, to: int, attempt: int) -> str:
    """`birds-c12-f3-a0`, `birds-prepare-a0`: deterministic, so that a create is idempotent."""
    return f"{run}-c{c}-f{to}-a{attempt}" if c.isdigit() else f"{run}-{c}-a{attempt}"


def attempt_folder(c: str, to: int, attempt: int) -> str:
    """Where an attempt's log and result lie, relative to the run's folder (20-trainer 5.2)."""
    return f"c{c}/attempts/f{to}.a{attempt}" if c.isdigit() else f"attempts/{c}.a{attempt}"


def checkpoint_folder(c: str, to: int) -> str:
    """Where a step's checkpoint lies, relative to the run's folder."""
    return f"c{c}/f{to}"
