"""What particular suites ask: the paper's figures, the 36 variants, lower bounds, batch sizes."""

from collections.abc import Mapping, Sequence
from typing import Any

from reporting import measures
from reporting.curves import Curve, Point, best_of_each
from training.errors import InputError

VARIANT_OPTIONS = ("descent", "product_norm", "vector_norm", "momo")
LOWER_BOUND = "loss_lower_bound"
BATCH_SIZE = "per_device_train_batch_size"
FACTORS = (1, 10, 30)  # times the best learning rate of the method


def paper(settings: Mapping[str, Any], curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Hold the final losses against the paper's, for the methods that `settings` has its figures of.

    Args:
        settings: the suite's `report`: `paper` (mean and std for each method, in nats per token) and
            `tolerance` (nats per token, 0 without).
        curves: of the suite.
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
        rows: the curves as results.json describes them.

    Returns:
        For each pair and fraction the `decades`; `at_least` if only Momo's basin is cut off, `at_most` if
        only the other is.
    """
    plain = {(row["method"], *_settings(row)): row["basins"] for row in rows}
    pairs = [
        (row, plain[key])
        for row in rows
        if row["method"].endswith("_momo")
        and (key := (row["method"].removesuffix("_momo"), *_settings(row))) in plain
    ]
    return [
        {"label": row["label"], "gains": {f: _gain(row["basins"][f], without[f]) for f in without}}
        for row, without in pairs
    ]


def _settings(row: Mapping[str, Any]) -> list[str]:
    return [f"{key} {value}" for name in ("method_options", "options") for key, value in row[name].items()]


def _gain(momo: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "decades": momo["decades"] - plain["decades"],
        "at_least": momo["at_least"] and not plain["at_least"],
        "at_most": plain["at_least"] and not momo["at_least"],
        "cut_off": momo["at_least"] and plain["at_least"],
    }


def variants(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Return the best loss of each combination of norms, and its regret at its highest learning rate."""
    return [
        {
            **{name: _word(curve.method_options[name]) for name in VARIANT_OPTIONS},
            "loss": curve.best.loss if curve.best else None,
            "learning_rate": curve.best.learning_rate if curve.best else None,
            "highest_learning_rate": curve.rates[-1],
            "regret_at_highest": measures.regret(curve.losses)[-1],
            "diverged_at_highest": bool(curve.points[-1].diverged),
        }
        for curve in curves
        if is_variant(curve)
    ]


def is_variant(curve: Curve) -> bool:
    """Whether all four choices vary in the suite."""
    return set(VARIANT_OPTIONS) <= set(curve.method_options)


def batch_size(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Return the best learning rate and loss of each method at each batch size."""
    return [
        {
            "label": curve.label,
            "method": curve.method,
            "batch_size": curve.options[BATCH_SIZE],
            "learning_rate": curve.best.learning_rate if curve.best else None,
            "loss": curve.best.loss if curve.best else None,
            "std": measures.mean_std(curve.best.losses)[1] if curve.best else None,
            "seeds": len(curve.best.done) if curve.best else 0,
        }
        for curve in curves
        if BATCH_SIZE in curve.options
    ]


# ------------------------------------------------------------------------------------ lower bounds


def lower_bound(curves: Sequence[Curve], suite_best: float | None) -> list[dict[str, Any]]:
    """Return the final loss under each lower bound at the same learning rates: the method's best and above.

    A method's best learning rate is the one of its lowest loss under any bound; the losses at it and at its
    multiples come with their excess over the best of the suite, as a fraction.
    """
    chosen = with_lower_bound(curves)
    base = {curve.method: curve.best for curve in best_of_each(chosen)}
    return [
        {
            "method": curve.method,
            "bound": bound_name(curve),
            "own_best": _compared(curve.best, suite_best),
            "at": {
                str(factor): _compared(_point_at(curve, base[curve.method], factor), suite_best)
                for factor in FACTORS
            },
        }
        for curve in sorted(chosen, key=lambda curve: (methods_of(chosen).index(curve.method), order(curve)))
        if curve.method in base
    ]


def with_lower_bound(curves: Sequence[Curve]) -> list[Curve]:
    """Return the curves of the methods whose lower bound varies; one without it has the default."""
    methods = {curve.method for curve in curves if LOWER_BOUND in curve.method_options}
    return [curve for curve in curves if curve.method in methods]


def methods_of(curves: Sequence[Curve]) -> list[str]:
    """Return the methods in the order of the suite."""
    return list(dict.fromkeys(curve.method for curve in curves))


def bound_name(curve: Curve) -> str:
    """Return the lower bound, and the options of its rule that vary with it."""
    options = {**curve.method_options, **curve.options}
    bound = options.pop(LOWER_BOUND, "default")
    short = {key.removeprefix("lower_bound_"): value for key, value in options.items()}
    return ", ".join([str(bound), *(f"{key}={value}" for key, value in short.items())])


def order(curve: Curve) -> tuple[bool, float, str]:
    """Sort numbers first, by size, then rules by name."""
    number = fixed_bound(curve)
    return number is None, number or 0.0, bound_name(curve)


def fixed_bound(curve: Curve) -> float | None:
    """Return the bound if it is a number."""
    try:
        return float(curve.method_options[LOWER_BOUND])
    except (KeyError, ValueError):
        return None


def _point_at(curve: Curve, base: Point, factor: float) -> Point | None:
    index = measures.nearest(curve.rates, factor * base.learning_rate)
    return None if index is None else curve.points[index]


def _compared(point: Point | None, suite_best: float | None) -> dict[str, Any] | None:
    if point is None or point.loss is None:
        return None
    known = not point.diverged
    return {
        "learning_rate": point.learning_rate,
        "loss": point.loss if known else None,
        "std": measures.mean_std(point.losses)[1] if known else None,
        "seeds": len(point.done),
        "diverged": len(point.diverged),
        "excess": (point.loss - suite_best) / abs(suite_best) if known and suite_best else None,
    }


def _word(value: Any) -> str:
    return str(value).lower()
