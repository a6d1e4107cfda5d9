"""The methods by name: how each prepares a request, runs its chains, and which options it takes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from alpenglow.priors.protocol import gradient_error, noise_floor, sigma_range
from alpenglow.samplers import alps, calibrated, metropolis
from alpenglow.samplers.chains import Chains, Population
from alpenglow.samplers.problem import Noise, Problem


def _as_given(problem: Problem, seed: int, options: Any) -> Chains[Any]:
    """For methods that need no pilot."""
    yield from ()
    return options


@dataclass(frozen=True)
class Method:
    """A sampler.

    options: the dataclass of its options, with `nfe`; defaults: where they differ from that dataclass's.
    prepare: once a request, (problem, seed, options) to what its populations share. chains: (problem, noise,
    what prepare returned) to the population of the chains of `noise`; populations are independent given that.
    pilot_nfe: what prepare spends, of its options.
    """

    chains: Callable[[Problem, Noise, Any], Chains[Population]]
    options: type
    defaults: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Problem, int, Any], Chains[Any]] = _as_given
    pilot_nfe: Callable[[Any], int] = lambda options: 0


METHODS: dict[str, Method] = {
    "calibrated": Method(
        calibrated.chains,
        calibrated.CalibratedOptions,
        prepare=calibrated.prepare,
        pilot_nfe=calibrated.pilot_nfe,
    ),
    "alps": Method(alps.chains, alps.AlpsOptions),
    "mala": Method(metropolis.chains, metropolis.MetropolisOptions),
    "kinetic-metropolis": Method(metropolis.chains, metropolis.MetropolisOptions, {"memory": 0.7}),
}
"""A sampler is one file beside this and one line here."""


def options_of(method: str, given: dict[str, Any], prior: Any) -> Any:
    """The options of a method, with those that the prior knows better than the defaults.

    Raises ValueError for an unknown method or option and for values that none can have.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    kind: Any = METHODS[method].options
    check_names(f'method "{method}"', given, kind)
    low, high = sigma_range(prior)
    options = METHODS[method].defaults | given
    if "sigma_min" not in options and method != "alps":
        options["sigma_min"] = max(kind.sigma_min, low)
    if method == "calibrated":
        smallest, largest = kind.sigma_range
        known = {
            "sigma_range": (min(smallest, high), min(largest, high)),
            "gradient_error": gradient_error(prior),
            "noise_floor": noise_floor(prior),
        }
        options = known | options
    chosen = kind(**options)
    check_numbers(f'method "{method}"', chosen)
    return chosen


def check_names(what: str, given: dict[str, Any], kind: type) -> None:
    """ValueError unless every key of `given` is a field of the dataclass `kind`."""
    known = [option.name for option in fields(kind)]
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{what} has no option {', '.join(unknown)}; it has {', '.join(known)}")


def check_numbers(what: str, options: Any) -> None:
    """ValueError unless every field of a dataclass of options has a value that its type allows."""
    for option in fields(options):
        value, name = getattr(options, option.name), option.name
        if option.type in (bool, "bool"):
            good = isinstance(value, bool)
        elif option.type in (int, "int"):
            good = type(value) is int and value >= 1
        elif option.type in (float, "float"):
            zero = name in ("memory", "memory_limit", "gradient_error", "noise_floor")
            good = (
                isinstance(value, int | float)
                and math.isfinite(value)
                and (value > 0 or (zero and value == 0))
            )
        else:
            good = len(value) == 2 and 0 < value[0] <= value[1]
        if not good:
            raise ValueError(f"{what}: {name} is {value!r}, which is no valid {option.type}")
