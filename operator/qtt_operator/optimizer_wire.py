"""Frames between the runner and an optimizer worker: four bytes of length, then JSON.

Shared by `optimizer_worker` and `optimizer_pool`; knows neither torch nor asyncio.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from qtt_core.errors import (
    Fault,
    MessageError,
    ObservationError,
    OptimizerError,
    QuickTuneError,
    SpecError,
    UnknownConfigurationError,
)

HEADER = struct.Struct(">I")
LARGEST = 256 * 2**20
"""A longer frame is no frame of ours: 10,000 events take about 5 MB."""

KNOWN: Mapping[str, type[QuickTuneError]] = {
    error.__name__: error
    for error in (MessageError, ObservationError, OptimizerError, UnknownConfigurationError)
}


def to_text(value: object) -> bytes:
    """JSON without a blank."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def encode(value: Mapping[str, Any], events: Sequence[bytes] | None = None) -> bytes:
    """A frame; `events`: JSON texts that become the list `events` of the object."""
    body = to_text(value)
    if events is not None:
        body = b"".join((body[:-1], b',"events":[', b",".join(events), b"]}"))
    return HEADER.pack(len(body)) + body


def length(header: bytes) -> int:
    """Bytes that follow a header. Raises: OptimizerError if it cannot be one."""
    (size,) = HEADER.unpack(header)
    if size > LARGEST:
        raise OptimizerError(
            f"a frame of {size} bytes; the other side does not speak this protocol"
        )
    return int(size)


def decode(body: bytes) -> dict[str, Any]:
    """The JSON object of a frame. Raises: OptimizerError if it is none."""
    try:
        value = json.loads(body)
    except ValueError as error:
        raise OptimizerError(f"a frame that is no JSON: {body[:80]!r}") from error
    if not isinstance(value, dict):
        raise OptimizerError(f"a frame that is no JSON object: {body[:80]!r}")
    return value


def read(stream: BinaryIO) -> dict[str, Any] | None:
    """The next frame of a blocking stream, None at its end."""
    header = _exactly(stream, HEADER.size)
    body = None if header is None else _exactly(stream, length(header))
    return None if body is None else decode(body)


def _exactly(stream: BinaryIO, count: int) -> bytes | None:
    data = b""
    while len(data) < count:
        part = stream.read(count - len(data))
        if not part:
            return None
        data += part
    return data


def error_to_json(error: Exception) -> dict[str, Any]:
    """An error as data: its type, its message, and its faults if it is the user's."""
    raw: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, SpecError):
        raw["faults"] = [[f.field, str(f.value), f.expected] for f in error.faults]
    return raw


def error_from_json(raw: Mapping[str, Any]) -> QuickTuneError:
    """The inverse; a type that is not ours becomes an OptimizerError that names it."""
    name, message = str(raw.get("type")), str(raw.get("message"))
    if name == "SpecError":
        return SpecError(Fault(*fault) for fault in raw.get("faults", ()))
    if name in KNOWN:
        return KNOWN[name](message)
    return OptimizerError(f"the optimizer worker failed: {name}: {message}")
