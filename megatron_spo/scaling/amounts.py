"""Short text for large numbers."""


def amount(number: float) -> str:
    """Returns a number with a suffix, such as 1.3M."""
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g}{suffix}"
    return f"{number:.3g}"
