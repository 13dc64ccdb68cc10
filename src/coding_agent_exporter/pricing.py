"""Takes token counts of one model from the ledger, gives the list price. The one user of genai-prices.

The library and its data take about 25 MB: they are imported when the first message without a cost turns up.
"""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

from coding_agent_exporter.model import PICO

if TYPE_CHECKING:
    from datetime import datetime


class Prices:
    """Prices by provider and model. Unknown models are remembered, so that asking again costs nothing."""

    def __init__(self, *, max_unknown: int = 10_000) -> None:
        self._unknown: set[tuple[str, str]] = set()
        self._max_unknown = max_unknown

    def estimate(self, provider: str, model: str, tokens: tuple[int, int, int, int], at: datetime) -> int | None:
        """The price in pico-USD of (input, output, cache_read, cache_creation) tokens at a time, None if unknown.

        Source of the rates: the data that ships with the installed genai-prices.
        """
        if (provider, model) in self._unknown:
            return None
        import genai_prices  # noqa: PLC0415  25 MB that most installations never need

        new, output, read, created = tokens
        usage = genai_prices.Usage(  # there, input includes what the caches served or stored
            input_tokens=new + read + created,
            output_tokens=output,
            cache_read_tokens=read,
            cache_write_tokens=created,
        )
        for provider_id in (provider, None):
            try:
                price = genai_prices.calc_price(
                    usage, model_ref=model, provider_id=provider_id, genai_request_timestamp=at
                )
            except LookupError as error:
                # A gateway's own name ("litellm", "corp-proxy") says nothing of the price, the model does. A known
                # provider without this model has no price for it.
                if provider_id is not None and "provider_id" in str(error):
                    continue
                break
            except ValueError:
                break
            return int((price.total_price * PICO).to_integral_value()) if price.total_price >= Decimal(0) else None
        if len(self._unknown) < self._max_unknown:
            self._unknown.add((provider, model))
        return None
