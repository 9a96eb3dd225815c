"""Which parameters a table has, where they start, and between which bounds."""

import math
from collections.abc import Mapping

# Name: (initial value, lower bound, upper bound) of the parameters of graph diffusion.
DIFFUSION_PARAMETERS = {
    "sigma": (0.3, 0.1, 0.5),  # patch L2 distance
    "tau": (0.1, 0.05, 0.3),  # diffusion step
    "radius": (10.0, 5.0, 20.0),  # pixels
    "sigma_s": (10.0, 5.0, 20.0),  # pixels
    "sigma_f": (0.3, 0.1, 0.5),  # patch L2 distance
    "smooth_steps": (5, 2, 10),  # iterations
}


def resolve(
    initial: Mapping[str, float], bounds: Mapping[str, tuple[float, float]]
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Start values and bounds of every parameter of a table, in order.

    Args:
        initial: Start values by name; names of graph diffusion alone replace its defaults.
        bounds: Lower and upper bound by name, likewise.

    Raises:
        ValueError: If a parameter that is none of graph diffusion's has only one of the two.
    """
    start, limits = dict(initial), dict(bounds)
    if set(start) <= set(DIFFUSION_PARAMETERS) and set(limits) <= set(DIFFUSION_PARAMETERS):
        start = {name: start.get(name, default) for name, (default, _, _) in DIFFUSION_PARAMETERS.items()}
        limits = {n: limits.get(n, (lower, upper)) for n, (_, lower, upper) in DIFFUSION_PARAMETERS.items()}
    unpaired = set(start) ^ set(limits)
    if unpaired:
        raise ValueError(
            f"parameters of your own need a start value and bounds each; {', '.join(sorted(unpaired))} "
            "stands in only one of initial and bounds"
        )
    return start, limits


def check_bounds(name: str, value: float, bounds: tuple[float, float], whole: bool) -> None:
    """Raises a `ValueError` for bounds that cannot be learned within, or a value outside of them.

    Args:
        name: Name of the parameter, for the message.
        value: Start value.
        bounds: Lower and upper bound.
        whole: Whether the parameter takes whole numbers, which stay out of log space.
    """
    lower, upper = bounds
    if not (math.isfinite(lower) and math.isfinite(upper) and lower <= upper):
        raise ValueError(f"bounds of {name!r} must be finite with lower ≤ upper, got ({lower}, {upper})")
    if lower < 0 or (lower == 0 and not whole):
        raise ValueError(f"bounds of {name!r} must be positive, since it is learned in log space, got lower={lower}")
    if not lower <= value <= upper:
        raise ValueError(f"{name}={value} lies outside its bounds ({lower}, {upper}): change the value or the bounds")
    if whole and not all(float(number).is_integer() for number in (value, lower, upper)):
        raise ValueError(f"{name} and its bounds must be whole numbers, got {value} in ({lower}, {upper})")
