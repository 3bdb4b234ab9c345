"""How the recipes' figures look, and what they take from the Trainer's log history."""

from typing import Any

# Okabe and Ito's colours, told apart with any colour vision; the line styles do for print in grey.
BLUE, VERMILION = "#0072B2", "#D55E00"
STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}

History = list[dict[str, Any]]


def series(history: History, key: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of one key of the Trainer's log history; null, once a NaN, is left out."""
    rows = [entry for entry in history if entry.get(key) is not None]
    return [row["step"] for row in rows], [float(row[key]) for row in rows]
