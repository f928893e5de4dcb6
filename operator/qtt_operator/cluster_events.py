"""Kubernetes Events about TuningRuns: few, one for each run and reason, with a count.

The same Event is written at most once a minute; what came in between is added to its count. An
Event is a courtesy: one that cannot be written is dropped and never holds a run up.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from qtt_core.errors import ClusterError
from qtt_operator.cluster import EVENTS, Cluster, Object
from qtt_operator.cluster_status import timestamp

log = logging.getLogger(__name__)

EVERY_SECONDS = 60.0
SERIES_SECONDS = 1800.0
"""The same thing after so long a silence is a new Event; the server forgets one after an hour."""

MESSAGE_LENGTH = 1024


@dataclass(slots=True)
class _Series:
    """One Event: what it is about, and what was not written yet."""

    about: Object
    message: str
    warning: bool
    began: float
    count: int = 0
    written: int = 0
    written_at: float = float("-inf")


class Events:
    """Writes Events of this process; `flush` now and then writes the counts that were held back."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        instance: str,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._cluster, self._instance, self._now, self._wall = cluster, instance, now, wall
        self._series: dict[tuple[str, str], _Series] = {}

    async def emit(self, about: Object, *, reason: str, message: str, warning: bool) -> None:
        """Say it, or count it if it was said a short while ago."""
        key = (about["metadata"]["uid"], reason)
        series = self._series.get(key)
        if series is None or self._now() - series.written_at > SERIES_SECONDS:
            series = self._series[key] = _Series(about, message, warning, self._wall())
        series.about, series.message, series.warning = about, message, warning
        series.count += 1
        if self._now() - series.written_at >= EVERY_SECONDS:
            await self._write(reason, series)

    async def flush(self) -> None:
        """Write the counts that were held back, forget what was said long ago."""
        for (uid, reason), series in list(self._series.items()):
            silent = self._now() - series.written_at
            if series.count > series.written and silent >= EVERY_SECONDS:
                await self._write(reason, series)
            elif silent > SERIES_SECONDS:
                self._series.pop((uid, reason), None)

    async def _write(self, reason: str, series: _Series) -> None:
        first, series.written, series.written_at = not series.written, series.count, self._now()
        body = self._event(reason, series)
        namespace, name = body["metadata"]["namespace"], body["metadata"]["name"]
        try:
            if first:
                await self._cluster.create(EVENTS, namespace, body)
            else:
                news = {name: body[name] for name in ("count", "lastTimestamp", "message", "type")}
                await self._cluster.patch(EVENTS, namespace, name, news)
        except ClusterError as error:
            if error.status != 409:  # the same series, before a restart
                log.debug("event %s: %s", reason, error)

    def _event(self, reason: str, series: _Series) -> Object:
        about = series.about
        metadata, wall = about["metadata"], self._wall()
        whole = f"{metadata['uid']}/{reason}/{int(series.began // EVERY_SECONDS)}"
        digest = hashlib.sha256(whole.encode()).hexdigest()[:16]
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
            "message": series.message[:MESSAGE_LENGTH],
            "type": "Warning" if series.warning else "Normal",
            "firstTimestamp": timestamp(series.began),
            "lastTimestamp": timestamp(wall),
            "count": series.count,
            "source": {"component": "quicktune-operator"},
            "reportingComponent": "quicktune.dev/operator",
            "reportingInstance": self._instance,
        }  # fmt: skip
