"""What each rank does: takes steps of the bare optimizer on one engine, from given gradients.

Usage: torchrun --nproc_per_node=N exact_worker.py ENGINE FOLDER
"""

import contextlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from exact_cases import BROKEN, CASES
from exact_engines import ENGINES, rank
from exact_refusals import run_refusals
from exact_run import run, run_broken


def main(engine, folder):
    dist.init_process_group("gloo")
    if engine == "refusals":
        seen = run_refusals()
    else:
        # The keys are plain tuples, which are equal to cases, because torch.load refuses other classes.
        seen = {tuple(case): run(ENGINES[engine], case) for case in CASES}
        seen |= {fault: run_broken(ENGINES[engine], fault) for fault in BROKEN}
    seen["ranks"] = dist.get_world_size()
    torch.save(seen, folder / f"rank{rank()}.pt")
    dist.barrier()


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        main(sys.argv[1], Path(sys.argv[2]))
    sys.stderr.flush()
    os._exit(0)  # two-rank CPU workers sometimes abort while the interpreter shuts down
