"""Run a bundle once in a fresh process and print its peak memory as JSON.

`python -m skipvision_export.benchmark.memory BUNDLE TEXT_TOKENS NEW_TOKENS`
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from skipvision_export.benchmark.timing import bench_inputs
from skipvision_export.runtime.pipeline import Bundle


def main() -> None:
    """Command line."""
    folder, text_tokens, new_tokens = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    bundle = Bundle.load(folder, verify=False)
    inputs = bench_inputs(bundle, text_tokens)
    bundle.generator.generate(inputs.input_ids, inputs.pixel_values, max_new_tokens=new_tokens)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kilobytes, macOS bytes.
    scale = 1 << 20 if sys.platform == "darwin" else 1 << 10
    print(json.dumps({"peak_rss_mb": peak / scale}))


if __name__ == "__main__":
    main()
