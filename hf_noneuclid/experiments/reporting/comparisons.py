"""What particular suites ask: the paper's figures, the gain by Momo, the 36 variants, batch sizes."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.reporting import measures
from hf_noneuclid.experiments.reporting.curves import Curve, best_of_each
from hf_noneuclid.experiments.sweeping.suite import as_text

VARIANT_OPTIONS = ("descent", "product_norm", "vector_norm", "momo")
BATCH_SIZE = "per_device_train_batch_size"
STEPS = "max_steps"  # goes with the batch size where the number of tokens is kept


def paper(settings: Mapping[str, Any], curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Hold the final losses against the paper's, for the methods that `settings` has its figures of.

    Args:
        settings: the suite's `report`: `paper` (mean and std for each method, in nats per token) and
            `tolerance` (nats per token, 0 without).
        curves: of one setting.
    """
    tolerance = float(settings.get("tolerance", 0.0))
    ours = {curve.method: curve.best for curve in best_of_each(curves)}
    rows = []
    for method, figures in (settings.get("paper") or {}).items():
        paper_mean, paper_std = _figures(method, figures)
        best = ours.get(method)
        losses = best.losses if best else []
        mean, std = measures.mean_std(losses) if losses else (None, None)
        rows.append(
            {
                "method": method,
                "learning_rate": best.learning_rate if best else None,
                "seeds": len(losses),
                "loss": mean,
                "std": std,
                "paper_loss": paper_mean,
                "paper_std": paper_std,
                "tolerance": tolerance,
                **measures.verdict(losses, paper_mean, paper_std, tolerance),
            }
        )
    return rows


def _figures(method: str, figures: Any) -> tuple[float, float]:
    try:
        return float(figures["mean"]), float(figures["std"])
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"report: paper: {method} is {figures}; it needs a mean and a std, in nats per token"
        ) from None


def momo_gains(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return by how much Momo widens the basin of each method that is in the suite with and without it.

    Args:
        rows: the curves of one setting as results.json describes them.

    Returns:
        For each pair and fraction the `decades`; `at_least` if only Momo's basin is cut off, `at_most` if
        only the other is; no `decades` where one of the two has no run that ended.
    """
    plain = {(row["method"], *_options(row)): row["basins"] for row in rows}
    pairs = [
        (row, plain[key])
        for row in rows
        if row["method"].endswith("_momo")
        and (key := (row["method"].removesuffix("_momo"), *_options(row))) in plain
    ]
    return [
        {"label": row["label"], "gains": {f: _gain(row["basins"][f], without[f]) for f in without}}
        for row, without in pairs
    ]


def _options(row: Mapping[str, Any]) -> list[str]:
    return [f"{key} {value}" for key, value in row["method_options"].items()]


def _gain(momo: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    known = momo["decades"] is not None and plain["decades"] is not None
    return {
        "decades": momo["decades"] - plain["decades"] if known else None,
        "at_least": momo["at_least"] and not plain["at_least"],
        "at_most": plain["at_least"] and not momo["at_least"],
        "cut_off": momo["at_least"] and plain["at_least"],
    }


def variants(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Return the best loss of each combination of norms, and its regret at its highest learning rate.

    Args:
        curves: of one setting.
    """
    return [
        {
            **{name: _word(curve.method_options[name]) for name in VARIANT_OPTIONS},
            "loss": curve.best.loss if curve.best else None,
            "learning_rate": curve.best.learning_rate if curve.best else None,
            "highest_learning_rate": curve.rates[-1],
            "regret_at_highest": measures.regret(curve.losses, curve.best_place)[-1],
            "diverged_at_highest": bool(curve.points[-1].diverged),
        }
        for curve in curves
        if is_variant(curve)
    ]


def is_variant(curve: Curve) -> bool:
    """Whether all four choices vary in the suite."""
    return set(VARIANT_OPTIONS) <= set(curve.method_options)


def batch_size(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Return the best learning rate and loss of each curve at each batch size, by method and size.

    Args:
        curves: of all settings; `options` holds what varies with the batch size, or beside it.
    """
    labels = list(dict.fromkeys(curve.label for curve in curves))
    chosen = [curve for curve in curves if BATCH_SIZE in curve.options]
    return [
        {
            "label": curve.label,
            "method": curve.method,
            "batch_size": curve.options[BATCH_SIZE],
            "options": {key: value for key, value in curve.options.items() if key != BATCH_SIZE},
            "learning_rate": curve.best.learning_rate if curve.best else None,
            "loss": curve.best.loss if curve.best else None,
            "std": measures.mean_std(curve.best.losses)[1] if curve.best else None,
            "seeds": len(curve.best.done) if curve.best else 0,
        }
        for curve in sorted(
            chosen, key=lambda c: (labels.index(c.label), beside_batch_size(c), c.options[BATCH_SIZE])
        )
    ]


def beside_batch_size(curve: Curve) -> str:
    """Return the setting without the batch size and the number of steps that goes with it."""
    rest = {key: value for key, value in curve.options.items() if key not in (BATCH_SIZE, STEPS)}
    return ", ".join(f"{key}={as_text(value)}" for key, value in rest.items())


def _word(value: Any) -> str:
    return str(value).lower()
