"""Run a bundle once in a fresh process and print its peak memory as JSON.

`python -m skipvision_export.benchmark.memory BUNDLE TEXT_TOKENS NEW_TOKENS THREADS BATCH CONCURRENCY`
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from skipvision_export.benchmark.load import Load
from skipvision_export.runtime.pipeline import Bundle


def main() -> None:
    """Command line."""
    text_tokens, new_tokens, threads, batch, concurrency = map(int, sys.argv[2:])
    bundle = Bundle.load(Path(sys.argv[1]), verify=False, threads=threads)
    Load(bundle, text_tokens, new_tokens, batch, concurrency).round()
    print(json.dumps({"peak_rss_mb": own_peak_mb()}))


def own_peak_mb() -> float:
    """Peak resident memory of this process in MiB.

    On Linux not by getrusage, whose maximum a child takes over from the process that started it.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / (1 << 10)
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # macOS counts bytes, others kilobytes.
        return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


if __name__ == "__main__":
    main()
