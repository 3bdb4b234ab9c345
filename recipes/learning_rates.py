"""Compare methods over learning rates: run pretrain.py for each pair and print a table of final losses.

    python recipes/learning_rates.py --methods muonmax_momo muon adamw_torch --learning_rates 1e-3 1e-2 1e-1 \
        --output_dir outputs/learning_rates -- --max_steps 200 --seed 1

What follows `--` goes to every run. A run whose metrics.json says that it had the same options is not
repeated.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.options import read_config

PRETRAIN = Path(__file__).with_name("pretrain.py")
ADAM_BETAS = ["--adam_beta1", "0.9", "--adam_beta2", "0.95"]  # the Trainer's 0.999 is slow for short runs
EXIT_DIVERGED = 3  # pretrain.py's
LOG_TAIL = 15  # lines shown of a run that failed

Table = dict[tuple[str, str], str]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then print the table; exits with 1 if a run failed."""
    args, flags = _parse(sys.argv[1:] if argv is None else list(argv))
    pairs = [(method, rate) for method in args.methods for rate in args.learning_rates]
    cells: Table = {}
    for number, (method, rate) in enumerate(pairs, start=1):
        cells[method, rate] = run(method, rate, args.output_dir, flags)
        print(
            f"[{number}/{len(pairs)}] {method} at {rate}: {cells[method, rate]}", file=sys.stderr, flush=True
        )
    print(markdown(args.methods, args.learning_rates, cells))
    if "failed" in cells.values():
        raise SystemExit(1)


def run(method: str, rate: str, output_dir: Path, flags: list[str]) -> str:
    """Train, unless that is done already.

    Returns:
        The final validation loss, `diverged`, or `failed` (the end of the log is then on stderr).
    """
    folder = output_dir / method / rate
    arguments = run_arguments(method, rate, folder, flags)
    if (metrics := finished(folder, arguments)) is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(f"{rate}.log")
        with log.open("w", encoding="utf-8") as stream:
            command = [sys.executable, str(PRETRAIN), *arguments]
            code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
        metrics = finished(folder, arguments)
        if code not in (0, EXIT_DIVERGED) or metrics is None:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            print(f"{log}, exit code {code}:", *lines[-LOG_TAIL:], sep="\n", file=sys.stderr)
            return "failed"
    return "diverged" if metrics["diverged"] else f"{metrics['eval_loss']:.4f}"


def run_arguments(method: str, rate: str, folder: Path, flags: list[str]) -> list[str]:
    """Return the arguments of pretrain.py for one run; the user's come last and win."""
    fixed = ["--optim", method, "--learning_rate", rate, "--output_dir", str(folder)]
    fixed += ["--overwrite_output_dir", "true", "--disable_tqdm", "true"]
    return [*fixed, *(ADAM_BETAS if method.startswith("adam") else []), *flags]


def finished(folder: Path, arguments: list[str]) -> dict[str, Any] | None:
    """Return the metrics of a run that has finished with these arguments, None if there is none."""
    path = folder / "metrics.json"
    if not path.is_file():
        return None
    metrics = json.loads(path.read_text(encoding="utf-8"))
    same = metrics["command"] == arguments and metrics["config"] == read_config(arguments)
    return metrics if same else None


def markdown(methods: Sequence[str], rates: Sequence[str], cells: Table) -> str:
    """Return a table with a row a method and a column a rate, the best of each row in bold."""
    lines = [f"| learning rate | {' | '.join(rates)} |", "|---" * (len(rates) + 1) + "|"]
    for method in methods:
        row = [cells[method, rate] for rate in rates]
        best = min((cell for cell in row if cell[0].isdigit()), key=float, default=None)
        shown = [f"**{cell}**" if cell == best else cell for cell in row]
        lines.append(f"| {method} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", required=True, help="values of pretrain.py's --optim")
    parser.add_argument("--learning_rates", nargs="+", required=True, help="peak learning rates")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/learning_rates"))
    args = parser.parse_args(argv[:split])
    for rate in args.learning_rates:
        try:
            float(rate)
        except ValueError:
            parser.error(f"--learning_rates: {rate!r} is not a number")
    return args, argv[split + 1 :]


if __name__ == "__main__":
    main()
