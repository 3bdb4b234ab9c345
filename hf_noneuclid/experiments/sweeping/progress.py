"""What a sweep shows while it runs, and at its end."""

import sys
from collections.abc import Sequence

from tqdm import tqdm

from hf_noneuclid.experiments.sweeping.study import Result
from hf_noneuclid.experiments.sweeping.suite import Run, Suite
from hf_noneuclid.experiments.sweeping.trial_queue import Outcome

ENDED = ("done", "diverged", "failed")


class Progress:
    """A bar over runs with the time left, and a line for every run that ends here.

    Args:
        suite: whose runs are counted.
        found: how they stand at the start.
    """

    def __init__(self, suite: Suite, found: Sequence[Result]) -> None:
        self._suite = suite
        total, ended = self._count(found)
        # Without a terminal, as in a job's log, the lines alone.
        self._bar = tqdm(
            total=total, initial=ended, unit="run", disable=None, dynamic_ncols=True, file=sys.stderr
        )
        self.update(found)

    def update(self, found: Sequence[Result]) -> None:
        """Show how the runs stand; other hosts' runs count, too."""
        self._bar.total, self._bar.n = self._count(found)
        running = sum(result.state == "running" for result in found)
        best = min((result for result in found if result.state == "done"), key=_loss, default=None)
        words = f"{running} running" + (f", best {_loss(best):.4f} {_where(best.run)}" if best else "")
        self._bar.set_postfix_str(words, refresh=True)

    def ended(self, run: Run, outcome: Outcome) -> None:
        """Print the line of a run."""
        tqdm.write(f"{_where(run)}: {describe(outcome)}", file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _count(self, found: Sequence[Result]) -> tuple[int, int]:
        ended = {result.run for result in found if result.state in ENDED}
        wanted = self._suite.wanted(found)
        return len(wanted), sum(run in ended for run in wanted)


def describe(outcome: Outcome | Result) -> str:
    """Return in words how an attempt or a run ended."""
    time = f" ({outcome.seconds:.0f} s)" if outcome.seconds is not None else ""
    if outcome.state == "done":
        return f"{outcome.loss:.4f}{time}"
    if outcome.state == "diverged":
        step = "" if outcome.diverged_at is None else f" at step {outcome.diverged_at}"
        return f"diverged{step}{time}"
    return f"{outcome.state}{time}"


def summary(found: Sequence[Result]) -> str:
    """Return the end of a sweep in words: failed runs with their reasons, and how many there are of each."""
    failed = [result for result in found if result.state == "failed"]
    lines = [f"\n{_where(result.run)} failed: {result.metrics.get('reason', '')}" for result in failed]
    counts = {state: sum(result.state == state for result in found) for state in ENDED}
    return "\n".join([*lines, ", ".join(f"{count} {state}" for state, count in counts.items())])


def _where(run: Run) -> str:
    return f"{run.label}, learning rate {run.learning_rate:g}, seed {run.seed}"


def _loss(result: Result) -> float:
    assert result.loss is not None
    return result.loss
