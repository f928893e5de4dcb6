"""The search space on ConfigSpace: four named spaces, canonical configurations, digests (10-optimizer 2.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtt_core.hub import Hub
from qtt_core.steps import Config, Scalar

if TYPE_CHECKING:
    import numpy as np
    from ConfigSpace import ConfigurationSpace

SPACES = ("native", "quicktune-v1", "qtt-compat", "paper-table3")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """A ConfigSpace with fidelity: T = `max_fidelity`, Δ = `step` epochs.

    Configurations that leave this class are canonical: plain JSON scalars, inactive names absent,
    off spelled "none" (categorical, mixed ordinals) or 0 (numeric), keys in the space's order.
    """

    space_id: str
    configspace: ConfigurationSpace
    max_fidelity: int
    step: int = 1

    @property
    def sha(self) -> str:
        """SHA-256 of the space's canonical JSON."""
        raise NotImplementedError

    @staticmethod
    def from_configspace(cs: ConfigurationSpace, max_fidelity: int, step: int = 1) -> SearchSpace:
        """Any ConfigSpace as a search space; `space_id` is `custom`."""
        raise NotImplementedError

    def default(self) -> Config:
        """The default configuration (explicit defaults, never ConfigSpace's first item)."""
        raise NotImplementedError

    def sample(self, n: int, rng: np.random.Generator) -> list[Config]:
        """n canonical configurations, not deduplicated; the same rng state gives the same list."""
        raise NotImplementedError

    def canonical(self, config: Mapping[str, object]) -> Config:
        """Validate against the space and return the canonical form; missing names take defaults.

        Raises: SpecError naming name, value and the legal values.
        """
        raise NotImplementedError

    def neighbours(self, config: Config, rng: np.random.Generator, n: int = 1) -> list[Config]:
        """n mutations of one or two coordinates."""
        raise NotImplementedError


def build_space(
    name: str,
    hub: Hub,
    *,
    max_fidelity: int,
    step: int = 1,
    overrides: Mapping[str, str] | None = None,
    in_channels: int = 3,
) -> SearchSpace:
    """A named space over the hub's models; overrides fix a value or narrow the choices ("a,b").

    Raises: SpecError for an unknown space, name or value, or an empty choice.
    """
    raise NotImplementedError


def check_values(space_id: str, config: Mapping[str, object]) -> Config:
    """What the trainer needs: values normalised (None, "none", 0 -> off; betas strings to text form),
    each legal somewhere in the named space, without knowing hub or overrides.

    Raises: SpecError naming every illegal name and value.
    """
    raise NotImplementedError


def parse_value(text: str, legal: Sequence[Scalar]) -> Scalar:
    """A manifest's quoted value ("1e-3", "true", "none") as the equal member of `legal`.

    Raises: ValueError if none is equal.
    """
    raise NotImplementedError
