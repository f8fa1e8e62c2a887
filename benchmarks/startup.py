"""`flawmap --help`: seconds and peak memory, beside those of `python -c pass` and of `anomalib --help`.

    python benchmarks/startup.py [--rounds 5] [--peer PYTHON]

PYTHON is an interpreter that has anomalib (2.7.0 was the one compared with). Fresh processes, taking turns, after one
round that does not count. A process's peak cannot be seen below that of this one, which starts it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median


def run(command: list[str]) -> tuple[float, float | None]:
    """Seconds and, where the system tells, peak megabytes."""
    # Installed packages have their bytecode at hand; without this a checkout might not.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    if not hasattr(os, "wait4"):  # Windows
        code, peak = process.wait(), None
    else:
        _, status, usage = os.wait4(process.pid, 0)
        code = process.returncode = os.waitstatus_to_exitcode(status)
        peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    seconds = time.perf_counter() - start
    if code != 0:
        sys.exit(f"{' '.join(command)} ended with {code}")
    return seconds, peak


def beside(python: str, name: str) -> str:
    """The command `name` of the environment of an interpreter."""
    found = shutil.which(name, path=str(Path(python).parent))
    return found or sys.exit(f"there is no {name} beside {python}: install it there")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", metavar="PYTHON")
    options = parser.parse_args()
    commands = {
        "flawmap --help": [beside(sys.executable, "flawmap"), "--help"],
        "python -c pass": [sys.executable, "-c", "pass"],
    }
    if options.peer:
        commands["anomalib --help"] = [beside(options.peer, "anomalib"), "--help"]
    runs: dict[str, list[tuple[float, float | None]]] = {name: [] for name in commands}
    for _ in range(1 + options.rounds):
        for name, command in commands.items():
            runs[name].append(run(command))

    print(f"medians of {options.rounds} rounds; ratios are over flawmap's")
    print(f"{'':18}{'seconds':>10}{'ratio':>8}{'peak MB':>10}{'ratio':>8}")
    ours: tuple[float, float | None] | None = None
    for name, measured in runs.items():
        seconds = median(s for s, _ in measured[1:])
        peaks = [peak for _, peak in measured[1:] if peak is not None]
        peak = median(peaks) if peaks else None
        ours = ours or (seconds, peak)
        memory = "?" if peak is None or ours[1] is None else f"{peak:10.0f}{peak / ours[1]:8.2f}"
        print(f"{name:18}{seconds:10.3f}{seconds / ours[0]:8.2f}{memory:>10}")


if __name__ == "__main__":
    main()
