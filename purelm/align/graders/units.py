"""Units of measurement, and other words after a number."""

from collections.abc import Sequence
from fractions import Fraction

__all__ = ["is_unit", "label"]

# dimension -> unit -> (its size, its other names). The sizes of one dimension are to a common scale.
TABLE: dict[str, dict[str, tuple[str, str]]] = {
    "length": {
        "m": ("1", "meter meters metre metres"), "cm": ("0.01", "centimeter centimeters centimetre centimetres"),
        "mm": ("0.001", "millimeter millimeters"), "km": ("1000", "kilometer kilometers kilometre kilometres kms"),
        "inch": ("0.0254", "in inches"), "ft": ("0.3048", "foot feet"), "yd": ("0.9144", "yard yards yds"),
        "mile": ("1609.344", "miles mi"),
    },
    "time": {
        "s": ("1", "sec secs second seconds"), "min": ("60", "mins minute minutes"), "h": ("3600", "hr hrs hour hours"),
        "day": ("86400", "days"), "week": ("604800", "weeks"), "ms": ("0.001", "millisecond milliseconds"),
    },
    "month": {"month": ("1", "months"), "year": ("12", "years yr yrs")},
    "mass": {
        "g": ("1", "gram grams"), "kg": ("1000", "kilogram kilograms kgs"), "mg": ("0.001", "milligram milligrams"),
    },
    "weight": {"oz": ("1", "ounce ounces"), "lb": ("16", "lbs pound pounds"), "ton": ("32000", "tons")},
    "volume": {"L": ("1", "l liter liters litre litres"), "mL": ("0.001", "ml milliliter milliliters")},
    "gallon": {"cup": ("1", "cups"), "pint": ("2", "pints"), "quart": ("4", "quarts"), "gallon": ("16", "gallons")},
    "money": {"dollar": ("1", "dollars usd bucks"), "cent": ("0.01", "cents")},
    "angle": {"degree": ("1", "degrees deg")},
    "radian": {"radian": ("1", "radians rad")},
    "": {"unit": ("1", "units")},
}  # fmt: skip
UNITS = {
    name: (dimension, Fraction(size))
    for dimension, units in TABLE.items()
    for unit, (size, others) in units.items()
    for name in (unit, *others.split())
}
POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cubed": 3}


def is_unit(word: str) -> bool:
    """Whether the word is a unit's name (m for metres, not M)."""
    return word in UNITS or (len(word) > 2 and word.lower() in UNITS)


def label(words: Sequence[tuple[str, int]]) -> tuple[str, Fraction]:
    """What the words (each with an exponent) measure, and in which size; a word that is no unit measures itself.

    >>> label([("square", 1), ("cm", 1)])
    ('length^2', Fraction(1, 10000))
    >>> label([("miles", 1), ("hour", -1)]) == label([("mile", 1), ("h", -1)])
    True
    """
    powers: dict[str, int] = {}
    size, next_power = Fraction(1), 1
    for word, power in words:
        if word.lower() in POWERS and word.lower().endswith("d"):
            next_power, last = 1, next(reversed(powers), "")
            if last:
                size *= size ** (POWERS[word.lower()] - 1) if len(powers) == 1 else 1
                powers[last] *= POWERS[word.lower()]
            continue
        if word.lower() in POWERS:
            next_power = POWERS[word.lower()]
            continue
        power, next_power = power * next_power, 1
        known = UNITS.get(word) or (UNITS.get(word.lower()) if len(word) > 2 else None)
        dimension, scale = known or (_singular(word.lower()), Fraction(1))
        size *= scale**power
        powers[dimension] = powers.get(dimension, 0) + power
    return " ".join(f"{d}^{n}" if n != 1 else d for d, n in sorted(powers.items()) if n and d), size


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word
