"""Who may work: one process at a time holds a Lease, and its epoch fences all it writes.

The Lease is taken before any work and renewed six times in its duration. Whether another holder is
alive is judged by our own clock and by whether its record changes, never by comparing wall clocks.
A holder that could not renew in time stops at once: the ledger would refuse what it still writes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from qtt_core.errors import ClusterError, ClusterUnavailableError
from qtt_operator.cluster import LEASES, Cluster, Object

log = logging.getLogger(__name__)

CONFLICT = 409


class LeadershipLostError(ClusterError):
    """The Lease may be another's: stop writing."""


class Leader:
    """A candidate. `highest_epoch`: the highest epoch ever fenced, read from the store."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        namespace: str,
        name: str,
        identity: str,
        highest_epoch: Callable[[], Awaitable[int]],
        lease_seconds: float = 12.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster, self._namespace, self._name = cluster, namespace, name
        self.identity = identity
        self._lease_seconds = lease_seconds
        self._deadline, self._every = lease_seconds * 2 / 3, lease_seconds / 6
        self._highest_epoch, self._now = highest_epoch, now
        self._lease: Object = {}
        self._seen: tuple[str, str] = ("", "")
        self._seen_at = now()
        self._renewed_at: float | None = None
        self._looked_at = now()
        self.has_looked = False
        """Whether the Lease was read or written once."""
        self.epoch = 0

    @property
    def leads(self) -> bool:
        """Whether this process holds the Lease and renewed it in time."""
        return self._renewed_at is not None and self._now() - self._renewed_at < self._lease_seconds

    @property
    def install(self) -> str:
        """Which install this is: the Lease's uid, the same for every process of it."""
        return str((self._lease.get("metadata") or {}).get("uid") or "")

    @property
    def look_seconds(self) -> float:
        """How often the Lease is looked at."""
        return self._every

    @property
    def unseen_seconds(self) -> float:
        """How long ago the Lease was last looked at, whether that worked or not."""
        return self._now() - self._looked_at

    def check(self) -> None:
        """Raises: LeadershipLostError once the Lease may be another's."""
        if self._renewed_at is not None and not self.leads:
            raise LeadershipLostError("the lease ran out before it could be renewed")

    async def acquire(self) -> int:
        """Wait for the Lease; returns this holder's epoch."""
        while True:
            began = self._now()
            try:
                if await self._try():
                    self._renewed_at = self._looked_at = began
                    self.has_looked = True
                    log.info("leader with epoch %d as %s", self.epoch, self.identity)
                    return self.epoch
                self.has_looked = True
            except ClusterUnavailableError as error:
                log.warning("lease: %s", error)
            except ClusterError as error:
                if error.status != CONFLICT:
                    raise
            self._looked_at = self._now()
            await asyncio.sleep(self._every)

    async def keep(self) -> None:
        """Renew until it fails for too long. Raises: LeadershipLostError."""
        while True:
            await asyncio.sleep(self._every)
            began = self._now()
            try:
                async with asyncio.timeout(self._deadline):
                    await self._write(self.identity, self._lease_seconds)
                self._renewed_at = began
            except (ClusterUnavailableError, TimeoutError) as error:
                log.warning("lease not renewed: %s", str(error) or "no answer")
            except LeadershipLostError:
                raise
            except ClusterError as error:
                if error.status != CONFLICT:
                    raise
                await self._reread()
            self._looked_at = self._now()
            assert self._renewed_at is not None
            if self._now() - self._renewed_at > self._deadline:
                raise LeadershipLostError(f"lease not renewed for {self._deadline:.0f} s")

    async def release(self) -> None:
        """Let the next one in at once."""
        if self.leads:
            await self._write("", 1.0)
            self._renewed_at = None

    # --- one look ----------------------------------------------------------------------------

    async def _try(self) -> bool:
        found = await self._cluster.get(LEASES, self._namespace, self._name)
        if found is None:
            self._lease = {}
            await self._take(0)
            return True
        spec = found.get("spec") or {}
        seen = (str(spec.get("holderIdentity") or ""), str(spec.get("renewTime") or ""))
        if seen != self._seen:
            self._seen, self._seen_at = seen, self._now()
        patience = float(spec.get("leaseDurationSeconds") or self._lease_seconds)
        if seen[0] and self._now() - self._seen_at <= patience:
            return False
        self._lease = found
        await self._take(int(spec.get("leaseTransitions") or 0))
        return True

    async def _take(self, transitions: int) -> None:
        """Write us as the holder, with an epoch above every earlier one."""
        self.epoch = max(transitions, await self._highest_epoch()) + 1
        await self._write(self.identity, self._lease_seconds, acquired=True)

    async def _write(self, holder: str, seconds: float, *, acquired: bool = False) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        old = self._lease.get("spec") or {}
        spec = {
            **old, "holderIdentity": holder, "leaseDurationSeconds": int(seconds),
            "renewTime": now, "leaseTransitions": self.epoch,
            "acquireTime": now if acquired else old.get("acquireTime", now),
        }  # fmt: skip
        if self._lease:
            body = {**self._lease, "spec": spec}
            self._lease = await self._cluster.replace(LEASES, self._namespace, body)
            return
        body = {
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._namespace}, "spec": spec,
        }  # fmt: skip
        self._lease = await self._cluster.create(LEASES, self._namespace, body)

    async def _reread(self) -> None:
        """After a conflict: a lost answer of our own, or another holder."""
        found = await self._cluster.get(LEASES, self._namespace, self._name)
        holder = ((found or {}).get("spec") or {}).get("holderIdentity")
        if found is None or holder != self.identity:
            raise LeadershipLostError(f"the lease is held by {holder or 'nobody'}")
        self._lease = found
