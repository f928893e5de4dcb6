"""Kubernetes Events about TuningRuns: few, and the same one at most once a minute.

An Event is a courtesy: one that cannot be written is dropped and never holds a run up.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable

from qtt_core.errors import ClusterError
from qtt_operator.cluster import EVENTS, Cluster, Object
from qtt_operator.cluster_status import timestamp

log = logging.getLogger(__name__)

EVERY_SECONDS = 60.0
REMEMBERED = 5000
MESSAGE_LENGTH = 1024


class Events:
    """Writes Events of this process; one per run and reason in a minute."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        instance: str,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._cluster, self._instance, self._now, self._wall = cluster, instance, now, wall
        self._said: dict[tuple[str, str], float] = {}

    async def emit(self, about: Object, *, reason: str, message: str, warning: bool) -> None:
        """Say it, unless it was said a short while ago."""
        uid = about["metadata"]["uid"]
        now = self._now()
        if now - self._said.get((uid, reason), -EVERY_SECONDS) < EVERY_SECONDS:
            return
        if len(self._said) > REMEMBERED:
            self._said = {k: at for k, at in self._said.items() if now - at < EVERY_SECONDS}
        self._said[(uid, reason)] = now
        try:
            namespace = about["metadata"]["namespace"]
            await self._cluster.create(
                EVENTS, namespace, self._event(about, reason, message, warning=warning)
            )
        except ClusterError as error:
            if error.status != 409:  # the same minute, before a restart
                log.debug("event %s: %s", reason, error)

    def _event(self, about: Object, reason: str, message: str, *, warning: bool) -> Object:
        metadata, wall = about["metadata"], self._wall()
        minute = f"{metadata['uid']}/{reason}/{int(wall // EVERY_SECONDS)}"
        digest = hashlib.sha256(minute.encode()).hexdigest()[:16]
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {
                "name": f"{metadata['name']}.{digest}",
                "namespace": metadata["namespace"],
            },
            "involvedObject": {
                "apiVersion": about["apiVersion"], "kind": about["kind"],
                "name": metadata["name"], "namespace": metadata["namespace"],
                "uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"],
            },
            "reason": reason,
            "message": message[:MESSAGE_LENGTH],
            "type": "Warning" if warning else "Normal",
            "firstTimestamp": timestamp(wall),
            "lastTimestamp": timestamp(wall),
            "count": 1,
            "source": {"component": "quicktune-operator"},
            "reportingComponent": "quicktune.dev/operator",
            "reportingInstance": self._instance,
        }  # fmt: skip
