"""Which devices of this machine take steps, found without importing torch.

The local back end starts one warm trainer per `Slot`. Nothing here touches a device: a CUDA context
costs seconds and hundreds of MiB, so that only the trainer's forks may make one.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qtt_core.errors import Fault, SpecError

_DEVICE = re.compile(r"cuda:(\d+)|cpu:(\d+)|cpu|cuda")
_HINT = "use cuda, cuda:0,cuda:1 or cpu:N"
MAX_SLOTS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A place where one job at a time runs: its device, and the CPU threads it may use."""

    index: int
    device: str
    threads: int


def make_slots(devices: tuple[str, ...], cores: int) -> tuple[Slot, ...]:
    """One slot per device; the cores are shared out evenly, at least one thread each."""
    threads = max(1, cores // max(1, len(devices)))
    return tuple(Slot(index=i, device=device, threads=threads) for i, device in enumerate(devices))


def parse_devices(text: str, cuda: int) -> tuple[str, ...]:
    """Read `--devices`: `cuda:0,cuda:1`, `cuda` (all `cuda` of them) or `cpu:2` (two CPU slots).

    Raises: SpecError for anything else, a device twice, or a CUDA device that is not there.
    """
    devices: list[str] = []
    for part in (item.strip() for item in text.split(",")):
        match = _DEVICE.fullmatch(part)
        if match is None:
            raise _refused(text, _HINT)
        if match[1] is not None:
            devices.append(part)
        elif part == "cuda":
            devices.extend(f"cuda:{n}" for n in range(cuda))
        else:
            devices.extend(["cpu"] * min(int(match[2] or 1), MAX_SLOTS + 1))
    numbers = [int(device[5:]) for device in devices if device.startswith("cuda")]
    if not devices or len(devices) > MAX_SLOTS:
        raise _refused(text, f"names {len(devices)} devices; {_HINT}")
    if len(set(numbers)) != len(numbers):
        raise _refused(text, "names a device twice")
    if numbers and max(numbers) >= cuda:
        raise _refused(text, f"this machine shows {cuda} CUDA devices; {_HINT}")
    return tuple(devices)


def _refused(text: str, expected: str) -> SpecError:
    return SpecError([Fault("--devices", text, expected)])


def default_devices(parallelism: int, cores: int, cuda: int) -> tuple[str, ...]:
    """CUDA devices where there are any, else CPU slots; never more than the run can use."""
    wanted = max(1, parallelism)
    if cuda:
        return tuple(f"cuda:{n}" for n in range(min(wanted, cuda)))
    return ("cpu",) * min(wanted, max(1, cores))


def count_cuda(environ: Mapping[str, str] | None = None) -> int:
    """How many CUDA devices a trainer process would see; 0 where torch was built without CUDA."""
    environ = os.environ if environ is None else environ
    if not _torch_has_cuda():
        return 0
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return visible_count(visible)
    nodes = sum(1 for node in Path("/dev").glob("nvidia*") if node.name[6:].isdigit())
    return nodes or _asked_driver()


def visible_count(visible: str) -> int:
    """Devices that `CUDA_VISIBLE_DEVICES` leaves: CUDA stops at the first one it cannot read."""
    count = 0
    for name in (item.strip() for item in visible.split(",")):
        if not name or name.startswith("-"):
            break
        count += 1
    return count


def _torch_has_cuda() -> bool:
    """Read torch's version file instead of importing it (2 s): `cuda` is None in CPU builds."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        return False
    version = Path(found.submodule_search_locations[0]) / "version.py"
    try:
        text = version.read_text()
    except OSError:
        return False
    return bool(re.search(r"^(cuda|hip)\b[^=\n]*=\s*['\"]", text, re.MULTILINE))


def _asked_driver() -> int:
    """Ask `nvidia-smi`, for machines without device nodes (WSL)."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    try:
        done = subprocess.run(  # noqa: S603  # a fixed argument list, no shell
            [tool, "-L"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return sum(1 for line in lines if line.startswith("GPU "))


def count_cores() -> int:
    """Cores this process may use: its affinity, cut by the container's CPU quota."""
    affine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = affine or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    if quota == "max":
        return cores
    return max(1, min(cores, math.ceil(int(quota) / int(period))))
