"""The claims of one run on a cluster: made on first use, listed, handed over, deleted.

One claim a run, or one a configuration (`checkpoint.scope: Config`). What a claim should look like
is `claims`' to say; when one may go is `chores`'.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from qtt_core.errors import ClusterError
from qtt_operator.claims import (
    access_modes,
    build_claim,
    claim_name,
    is_per_config,
    owners,
    unavailable,
)
from qtt_operator.cluster import CLAIMS, Cluster, Object
from qtt_operator.farewell import claims_of
from qtt_operator.informer import run_uid
from qtt_operator.names import CONFIG_LABEL, SHARED_WEIGHTS
from qtt_operator.owner import RunObject
from qtt_operator.settings import OperatorSettings
from qtt_operator.supplies import build_weights_claim

log = logging.getLogger(__name__)

CONFLICT = 409
RELIST_SECONDS = 60.0
"""Claims change by our own hand; this often we look whether by another's, too."""


CLAIM_SECONDS, LOOK_SECONDS = 60.0, 30.0
"""A claim that is Pending this long after its first pod; how often it is looked at then."""


@dataclass(slots=True, kw_only=True)
class Volumes:
    """`run` tells the TuningRun as it is; `known`: configuration -> its claim (scope Config)."""

    cluster: Cluster
    run: Callable[[], RunObject]
    settings: OperatorSettings
    clock: Callable[[], float]
    known: dict[str, Object] = field(default_factory=dict)
    trouble: str = ""
    """Why pods wait for a claim of ours that nobody provides; empty while that is not so."""
    _listed_at: float | None = None
    _looked_at: float = 0.0
    _made: set[str] = field(default_factory=set)
    _owned_as: str = ""

    @property
    def owner(self) -> RunObject:
        """The TuningRun; its spec may have been edited."""
        return self.run()

    @property
    def per_config(self) -> bool:
        """Whether every configuration has a claim of its own."""
        return is_per_config(self.owner.run.spec)

    async def ensure(self, c: str = "") -> bool:
        """Make the claim that a Job mounts; False while an old one of this name is going away."""
        claim = build_claim(self.owner, self.settings.checkpoint_defaults, c)
        if claim is None or claim["metadata"]["name"] in self._made:
            return True
        found = await self._make(claim)
        if found is not None and c:
            self.known[c] = found
        return found is not None

    async def ensure_weights(self, name: str) -> bool:
        """Make the claim of pretrained weights, if it is ours to make; False as above.

        One that an earlier run of this name owns goes with it, and with it what we would write.
        """
        claim = build_weights_claim(self.owner, name, self.settings)
        if claim is None or name in self._made:
            return True
        found = await self._make(claim)
        owned = (found or {"metadata": {}})["metadata"].get("ownerReferences") or ()
        foreign = any(o["kind"] == "TuningRun" and o["uid"] != self.owner.uid for o in owned)
        if foreign:
            self._made.discard(name)
        return found is not None and not foreign

    async def _make(self, claim: Object) -> Object | None:
        """The claim as the server has it, None while an old one of this name is going away."""
        namespace, name = claim["metadata"]["namespace"], claim["metadata"]["name"]
        try:
            found: Object | None = await self.cluster.create(CLAIMS, namespace, claim)
        except ClusterError as error:
            if error.status != CONFLICT:
                raise
            found = await self.cluster.get(CLAIMS, namespace, name)
        if found is None or "deletionTimestamp" in found["metadata"]:
            return None
        self._made.add(name)
        return found

    async def exist(self) -> bool:
        """Whether there is a claim that results could be read from."""
        if self.per_config:
            await self.refresh()
            return bool(self.known)
        namespace = self.owner.run.namespace
        return await self.cluster.get(CLAIMS, namespace, claim_name(self.owner)) is not None

    async def refresh(self) -> None:
        """List the claims of configurations, once in a while. Raises: ClusterError."""
        now = self.clock()
        if not self.per_config:
            return
        if self._listed_at is not None and now - self._listed_at < RELIST_SECONDS:
            return
        found = await claims_of(self.cluster, self.owner.run.namespace, self.owner.uid)
        self.known = {
            claim["metadata"]["labels"][CONFIG_LABEL]: claim
            for claim in found
            if CONFIG_LABEL in claim["metadata"]["labels"]
            and "deletionTimestamp" not in claim["metadata"]
        }
        self._made = {claim["metadata"]["name"] for claim in self.known.values()}
        self._listed_at = now

    async def look(self, waiting_since: float | None) -> None:
        """See whether a class gives no ReadWriteMany, once a pod has waited a minute for it.

        `waiting_since`: when the oldest pod that has not started was created; None: none waits.
        """
        now, spec = self.clock(), self.owner.run.spec
        modes = access_modes(spec, self.settings.checkpoint_defaults)
        if waiting_since is None or not ("ReadWriteMany" in modes or SHARED_WEIGHTS in self._made):
            self.trouble = ""
            return
        soon = now - waiting_since < CLAIM_SECONDS or now - self._looked_at < LOOK_SECONDS
        if soon:
            return
        self._looked_at = now
        names = [c["metadata"]["name"] for c in self.known.values()]
        names = names if self.per_config else [claim_name(self.owner)]
        for name in [*self._made & {SHARED_WEIGHTS}, *(names if "ReadWriteMany" in modes else ())]:
            found = await self.cluster.get(CLAIMS, self.owner.run.namespace, name)
            if found is not None and (found.get("status") or {}).get("phase") == "Pending":
                self.trouble = unavailable(found)
                return
        self.trouble = ""

    async def drop(self, c: str) -> None:
        """Delete a configuration's claim; Kubernetes waits for a pod that still uses it."""
        claim = self.known.pop(c, None)
        if claim is None:
            return
        name = claim["metadata"]["name"]
        self._made.discard(name)
        log.info("%s: deleting it, nothing in it is kept", name)
        await self.cluster.delete(
            CLAIMS, self.owner.run.namespace, name, uid=claim["metadata"]["uid"], foreground=False
        )

    async def hand_over(self) -> None:
        """Let the claims we made follow `deletionPolicy`, which may be edited at any time.

        Owned by the TuningRun they go with it; owned by nobody they stay.
        """
        policy = self.owner.run.spec.deletion_policy
        if policy == self._owned_as:
            return
        wanted, namespace = owners(self.owner), self.owner.run.namespace
        for claim in await claims_of(self.cluster, namespace, self.owner.uid):
            metadata = claim["metadata"]
            mine = [o for o in metadata.get("ownerReferences") or () if o["uid"] == self.owner.uid]
            if bool(mine) != bool(wanted) and run_uid(claim) == self.owner.uid:
                others = [
                    o for o in metadata.get("ownerReferences") or () if o["uid"] != self.owner.uid
                ]
                body: Object = {"metadata": {"ownerReferences": [*others, *wanted]}}
                await self.cluster.patch(CLAIMS, namespace, metadata["name"], body)
        self._owned_as = policy
