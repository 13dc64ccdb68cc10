"""Takes a call that may never end, gives its result in time.

Nothing ends a call to a file server that is gone: whoever makes it must be expendable.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")


def within(seconds: float, call: Callable[[], Result]) -> Result | None:
    """What the call returns, or raises; None when it takes longer, and goes on without anybody waiting for it."""
    answer: Future[Result] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # noqa: BLE001  handed to whoever waits
            answer.set_exception(error)

    threading.Thread(target=run, name="errand", daemon=True).start()
    wait((answer,), timeout=seconds)
    return answer.result(0) if answer.done() else None
