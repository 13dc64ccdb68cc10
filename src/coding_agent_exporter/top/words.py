"""Takes numbers and names, gives `top` the few characters that it has room for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TextIO

from coding_agent_exporter.model import PICO
from coding_agent_exporter.top.view import CLOSE, NEAR
from coding_agent_exporter.usagetable import columns, printable, shorten

if TYPE_CHECKING:
    from coding_agent_exporter.top.view import Spend
    from coding_agent_exporter.usagetable import Money

_AGES = ((60, 1, "s"), (3600, 60, "m"), (48 * 3600, 3600, "h"), (1000 * 86_400, 86_400, "d"))
_UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


def age(since: float | None, now: float) -> str:
    """How long ago something was, in at most four characters."""
    if since is None:
        return "-"
    seconds = max(0.0, now - since)
    for below, size, unit in _AGES:
        if seconds < below:
            return f"{int(seconds // size)}{unit}"
    return f"{min(999, int(seconds // (365 * 86_400)))}y"


def count(number: float) -> str:
    """A count in at most five characters, as long as there is a unit for it; of nothing, `-`."""
    if number < 0.5:
        return "-"
    for size, unit in _UNITS:
        # What would be rounded up to 1000 of a unit is 1.00 of the next one.
        if number >= 0.9995 * size:
            value = number / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{unit}"
    return f"{number:.0f}"


def percent(value: float | None) -> str:
    """How full a context is, with a mark from each threshold on that can be seen without colour too.

    Rounded down: what is not near the limit must not look as if it were.
    """
    if value is None:
        return "?  "
    return f"{min(999, math.floor(value))}{'!!' if value >= NEAR else '! ' if value >= CLOSE else '  '}"


def amount(pico: int) -> str:
    """Pico-USD as USD, in at most eight characters up to a million."""
    usd = pico / PICO
    if not pico:
        return "0"
    if 0 < usd < 0.00005:
        return "<.0001"
    return f"{usd:.{4 if abs(usd) < 1 else 2}f}"


def dollars(money: Money | None) -> str:
    """An amount; `~`: estimated, at least in part; `?`: there is no price; `-`: there is none."""
    if money is None:
        return "-"
    if not money.known:
        return "?"
    return f"{'~' if money.estimated else ''}{amount(money.total)}"


def spent(spend: Spend) -> str:
    """One cell for both kinds of money, which are not added: imputed money stands in brackets, or is a `+`."""
    if spend.billed is None and spend.imputed is not None:
        return f"({dollars(spend.imputed)})"
    return f"{dollars(spend.billed)}{'+' if spend.imputed is not None else ''}"


def name(text: str, *, unicode: bool) -> str:
    """A name that somebody else wrote, harmless to a terminal: control and format characters, line ends and what has
    no glyph stand there as escapes, and so does all but ASCII where the terminal cannot show more."""
    text = printable(text)
    return text if unicode else text.encode("ascii", "backslashreplace").decode()


def speaks_unicode(stream: TextIO) -> bool:
    """Whether a stream can say more than ASCII; other encodings than UTF-8 are not worth telling apart."""
    return (stream.encoding or "").lower().replace("-", "") == "utf8"


def fit(text: str, width: int, *, unicode: bool, right: bool = False, tail: bool = False) -> str:
    """Text of exactly so many columns: padded, or with its middle left out; with `tail`, its beginning."""
    ellipsis = "…" if unicode else "~"
    if tail and columns(text) > width:
        while columns(text) > width - 1:
            text = text[1:]
        text = ellipsis + text
    shown = shorten(text, width, ellipsis)
    padding = " " * (width - columns(shown))
    return padding + shown if right else shown + padding
