"""What the suite of lower bounds asks: the final loss under each of them, at the same learning rates."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_noneuclid.experiments.reporting import measures
from hf_noneuclid.experiments.reporting.bounds import LOWER_BOUND, bound_name, bound_order, others
from hf_noneuclid.experiments.reporting.curves import Curve, Point, lowest_loss, methods_of

FACTORS = (1, 10, 30)  # times the best learning rate of the method


def lower_bound(curves: Sequence[Curve]) -> dict[str, Any]:
    """Return the final loss under each lower bound at the same learning rates: the method's best and above.

    A method's best learning rate is the one of its lowest loss under any bound.

    Args:
        curves: of one setting.

    Returns:
        `methods`: the best of each, with its excess over the best of any method, as a fraction.
        `bounds`: the losses under each bound, with their excess over the best of the same method.
        Nothing where no lower bound varies.
    """
    chosen = with_lower_bound(curves)
    if not chosen:
        return {}
    bases = {method: base for method in methods_of(chosen) if (base := _base(chosen, method))}
    best = lowest_loss(curves)
    methods = [{"method": method, **_compared(base, best)} for method, base in bases.items()]
    ordered = sorted(chosen, key=lambda curve: (methods_of(chosen).index(curve.method), order(curve)))
    bounds = [_bound(curve, bases[curve.method]) for curve in ordered if curve.method in bases]
    return {"methods": methods, "bounds": bounds}


def with_lower_bound(curves: Sequence[Curve]) -> list[Curve]:
    """Return the curves of the methods whose lower bound varies; one without it has the default."""
    methods = {curve.method for curve in curves if LOWER_BOUND in curve.method_options}
    return [curve for curve in curves if curve.method in methods]


def bound_of(curve: Curve) -> str:
    """Return the lower bound in short, and the method's options that vary beside it."""
    return ", ".join([bound_name(curve.method_options), *others(curve.method_options)])


def order(curve: Curve) -> tuple[tuple[int, float, float, str], str]:
    """Sort numbers first, then the rules."""
    return bound_order(curve.method_options), bound_of(curve)


def _base(curves: Sequence[Curve], method: str) -> Point | None:
    points = [curve.best for curve in curves if curve.method == method and curve.best]
    return min(points, key=lambda point: point.loss, default=None)


def _bound(curve: Curve, base: Point) -> dict[str, Any]:
    return {
        "method": curve.method,
        "bound": bound_of(curve),
        "own_best": _compared(curve.best, base.loss),
        "at": {str(factor): _compared(_point_at(curve, base, factor), base.loss) for factor in FACTORS},
    }


def _point_at(curve: Curve, base: Point, factor: float) -> Point | None:
    index = measures.nearest(curve.rates, factor * base.learning_rate)
    return None if index is None else curve.points[index]


def _compared(point: Point | None, best: float) -> Mapping[str, Any] | None:
    if point is None or point.loss is None:
        return None
    known = not point.diverged
    return {
        "learning_rate": point.learning_rate,
        "loss": point.loss if known else None,
        "std": measures.mean_std(point.losses)[1] if known else None,
        "seeds": len(point.done),
        "diverged": len(point.diverged),
        "excess": (point.loss - best) / abs(best) if known and best else None,
    }
