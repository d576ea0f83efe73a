"""All GPU benchmarks in one command, the most valuable first, within a time limit; run it again to go on.

python benchmarks/gpu/run_all.py --budget 570 --out benchmarks/results
python benchmarks/gpu/run_all.py --small --out build/gpu_small     # everything at small size on a CPU

Each script runs in a process of its own, writes OUT/gpu_NAME.json after every cell and is ended where it
takes a minute more than its share. What is finished, by the same sources, is not run again; --again NAME
does. What all of them said is in OUT/gpu_run_all.log.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from where import RESULTS, ROOT, sources

# Seconds that each may take of one call, and further arguments; together 26 minutes, starts not counted.
SCRIPTS: dict[str, tuple[float, list[str]]] = {
    "inference": (450, []),
    "kv_prune": (150, []),
    "row_gather": (60, []),
    "training": (360, []),
    "ort_cuda": (240, []),
    "engines": (150, []),
    "tiny_vlm": (150, ["--output", str(ROOT / "build" / "gpu_tiny_vlm")]),
}
GRACE = 60
LEAST = 45  # seconds with which a script is worth its start


def finished(file: Path, small: bool) -> bool:
    """Did this script end without anything left, by the sources of now?"""
    if not file.is_file():
        return False
    found = json.loads(file.read_text(encoding="utf-8"))
    return found.get("exit") == 0 and found["small"] == small and found["sources_sha256"] == sources()


def run(name: str, seconds: float, args: argparse.Namespace, log: Path) -> int | None:
    """The exit status of one script; None where it was ended."""
    command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *SCRIPTS[name][1]]
    command += ["--json", str(args.out / f"gpu_{name}.json"), "--budget", str(seconds)]
    command += ["--small"] if args.small else []
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"== {name}, {seconds:.0f} s\n")
        stream.flush()
        try:
            # Its lines come on the terminal at the end, all of them are in the log as they are written.
            done = subprocess.run(command, stdout=stream, stderr=stream, timeout=seconds + GRACE, check=False)
        except subprocess.TimeoutExpired:
            stream.write(f"== {name} was ended\n")
            return None
    return done.returncode


def main() -> int:
    """Command line; exits 0 where all is done, 1 where something failed, 3 where something is left."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=1800, help="seconds of this call (default 1800)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--again", nargs="+", choices=SCRIPTS, default=[], help="though they are finished")
    parser.add_argument("--small", action="store_true", help="small sizes on the CPU")
    args = parser.parse_args()
    end = time.monotonic() + args.budget
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "gpu_run_all.log"
    log.write_text("", encoding="utf-8")
    status: dict[str, int | None] = {}
    for name in args.only:
        file, left = args.out / f"gpu_{name}.json", end - time.monotonic()
        if name in args.again:
            file.unlink(missing_ok=True)
        if finished(file, args.small):
            status[name] = 0
            print(f"{name}: finished before", flush=True)
            continue
        if left < LEAST + GRACE:
            status[name] = 3
            print(f"{name}: no time left", flush=True)
            continue
        start, read = time.monotonic(), log.stat().st_size
        status[name] = run(name, min(SCRIPTS[name][0], left - GRACE), args, log)
        said = log.read_bytes()[read:].decode(errors="replace").splitlines()
        print("\n".join(said[-60:]))
        print(f"{name}: exit {status[name]} after {time.monotonic() - start:.0f} s", flush=True)
    print(", ".join(f"{name} {code}" for name, code in status.items()))
    return 1 if 1 in status.values() else 0 if set(status.values()) == {0} else 3


if __name__ == "__main__":
    sys.exit(main())
