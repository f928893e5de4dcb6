"""Device, threads and number format of a step (20-trainer 4.3, 5.3).

The dtype policy is part of a checkpoint's identity: fp32 on a CPU whatever `amp` says, bf16 or fp16
on a GPU.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qtt_core.jobs import JobDocument
from qtt_core.results import State
from qtt_trainer.endings import EndedError

CHANNELS_LAST_FAMILIES = frozenset(
    {"efficientnet", "convnext", "dla", "mobilevit", "mobilevitv2", "edgenext", "resnet"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Where a step computes, and in which format: `dtype` is fp32, bf16 or fp16."""

    device: torch.device
    dtype: str

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context for a forward pass."""
        if self.dtype == "fp32":
            return contextlib.nullcontext()
        kind = torch.bfloat16 if self.dtype == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=kind)

    def scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler, active for fp16 only."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == "fp16")


def choose_precision(job: JobDocument, *, amp: bool) -> Precision:
    """Device and format of a job.

    Raises: EndedError `infra_gpu` when the wanted device is not there.
    """
    device = choose_device(job.device)
    if device.type == "cpu" or not amp:
        return Precision(device=device, dtype="fp32")
    modern = torch.cuda.get_device_capability(device) >= (8, 0)
    return Precision(device=device, dtype="bf16" if modern else "fp16")


def choose_device(wanted: str) -> torch.device:
    """`auto` is the first GPU, or the CPU where there is none."""
    available = torch.cuda.is_available()
    if wanted == "auto":
        return torch.device("cuda", 0) if available else torch.device("cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (
        not available or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise EndedError(State.INFRA_GPU, f"device {wanted} is not available to this process")
    return device


def set_up_process(job: JobDocument, device: torch.device) -> None:
    """Threads, and on a GPU the math modes; once per process, before the first tensor operation."""
    torch.set_num_threads(job.limits.threads or usable_cpus())
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.deterministic = job.flags.deterministic
    if job.flags.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def usable_cpus() -> int:
    """CPUs that this process may use: affinity and the cgroup's quota."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return count
    if quota.isdecimal() and period.isdecimal():
        count = min(count, max(1, int(quota) // int(period)))
    return count


def loader_workers(job: JobDocument, device: torch.device) -> int:
    """DataLoader workers: none on a CPU, which the model needs itself; else one per spare core.

    Half as many for each attempt that the host killed for memory.
    """
    count = job.limits.workers
    if count is None:
        count = 0 if device.type == "cpu" else max(1, usable_cpus() - 1)
    return count >> job.limits.oom_kills


def gpu_name(device: torch.device) -> str:
    """The accelerator's product name, empty on a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of the accelerator; of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
