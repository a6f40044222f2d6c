"""The benchmarks of a CUDA device: `python -m bench.run --out FOLDER` (make gpu calls it; the CPU's are make bench).

Sizes come most wanted first. When the time limit has passed no new one is started, and those left out are named.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.case import PEER, VQFAST, Case
from bench.ceilings import load
from bench.device import device_text, slug
from bench.measure import Effort, Measured, measure
from bench.peers import cases
from bench.rows import OK, RESULTS, store
from bench.table import best, seconds

EFFORT = Effort(seconds=0.4, least=10, most=100)


def line(case: Case, measured: Sequence[Measured], took: float) -> str:
    """One line of progress: who won, who was wrong, who is not here."""
    rows = [entry.row for entry in measured if entry.row is not None]
    ours, peer = best(rows, VQFAST), best(rows, PEER)
    parts = [f"{case} ({took:.0f} s)"]
    parts += [f"{row.backend} {seconds(row.median_s)} {row.clock}" for row in (ours, peer) if row is not None]
    parts += [f"{row.backend} {row.status}: {row.note}" for row in rows if row.status != OK]
    parts += [f"no {entry.contender.name}: {entry.reason}" for entry in measured if entry.reason]
    return "; ".join(parts)[:300]


def _alive() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every backend of vqfast was right at every size, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV and of ceilings.json")
    parser.add_argument("--ops", default="", help="comma-separated, default all")
    parser.add_argument("--until", type=float, default=float("inf"), help="start nothing after this time (epoch)")
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--bad", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    path = args.out / f"{slug(device_text('cuda'))}.csv"
    committed = RESULTS / path.name
    if not path.exists() and committed.exists():
        shutil.copy(committed, path)
    ceilings = load(args.out / "ceilings.json")
    todo, bad = cases("cuda", args.ops), args.bad
    for i, case in enumerate(todo[args.start :], args.start):
        if time.time() > args.until:
            print("not run, out of time: " + "; ".join(str(left) for left in todo[i:]))
            break
        start = time.time()
        try:
            measured = measure(case, EFFORT, ceilings.floor if ceilings else lambda _: None)
        except RuntimeError as error:
            bad += 1
            print(f"{case}: {str(error).splitlines()[0]}", flush=True)
        else:
            store(path, [entry.row for entry in measured if entry.row is not None])
            bad += sum(e.row is not None and e.row.status != OK and e.contender.role == VQFAST for e in measured)
            print(line(case, measured, time.time() - start), flush=True)
        if not _alive():
            # An illegal access ends a process's use of the device: the rest goes on in a new one.
            again = ["--out", str(args.out), "--ops", args.ops, "--until", str(args.until)]
            again += ["--start", str(i + 1), "--bad", str(bad)]
            os.execv(sys.executable, [sys.executable, "-m", "bench.run", *again])
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
