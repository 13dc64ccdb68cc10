"""Takes numbers, gives them as people read them: a few digits, and a unit."""

from __future__ import annotations


def count(value: float) -> str:
    """12, 3.4k, 5.6M."""
    for least, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= least:
            return f"{value / least:.3g}{letter}"
    return f"{value:.0f}"


def plain(value: float) -> str:
    return f"{value:.3g}"


def dollars(value: float) -> str:
    """An axis of money."""
    return f"${value:,.0f}"


def money(value: float) -> str:
    return f"${value:,.2f}" if value < 100 else f"${value:,.0f}"


def percent(value: float) -> str:
    return f"{value:.0f}%"


def share(value: float) -> str:
    return f"{100 * value:.1f}%"


def duration(value: float) -> str:
    """120 ms, 4.2 s, 12 min, 3.4 h."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.3g} s"
    return f"{value / 60:.2g} min" if value < 3600 else f"{value / 3600:.3g} h"
