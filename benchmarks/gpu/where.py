"""What a result was measured on and made of: device, driver, versions and sources."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `python benchmarks/gpu/NAME.py` works without an installation
sys.path.append(str(ROOT / "benchmarks"))
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "peft", "numpy")
# What a result depends on, where there is no git to name a commit.
SOURCES = (
    "skipvision_export/**/*.py",
    "plugins/kv_prune/kernel/*",
    "benchmarks/gpu/*.py",
    "benchmarks/decoder_runs.py",
)


def stamp(name: str, small: bool, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Device, driver, versions and sources: what makes two results comparable."""
    where: dict[str, Any] = {"kind": device.type, "name": platform.processor() or platform.machine()}
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(0)
        where |= {
            "name": facts.name,
            "capability": f"{facts.major}.{facts.minor}",
            "multiprocessors": facts.multi_processor_count,
            "memory_bytes": facts.total_memory,
            "l2_bytes": facts.L2_cache_size,
            "driver": _asked("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
        }
    return {
        "benchmark": name,
        "small": small,
        "device": where,
        "dtype": str(dtype).removeprefix("torch."),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: found for package in PACKAGES if (found := _version(package))},
        "commit": _asked("git", "-C", str(ROOT), "rev-parse", "HEAD") or os.environ.get("SKIPVISION_COMMIT"),
        "sources_sha256": sources(),
    }


def without_paths(text: str) -> str:
    """Absolute paths cut to their last part: results are committed."""
    return re.sub(r"(?:/[\w.+@-]+)+/([\w.+@-]+)", r"\1", text)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _asked(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip().splitlines() or [None])[0]


def sources() -> str:
    """A digest of what results depend on."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in SOURCES for file in ROOT.glob(pattern)):
        digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()
