"""Takes HTTP requests, friendly or not, gives them to an `App` and sends its replies back.

`server` holds the places, `connection` one client, `request` parses, `access` does what `webconfig` asks for.
"""

from coding_agent_exporter.web.connection import App, Reply
from coding_agent_exporter.web.server import Server

__all__ = ["App", "Reply", "Server"]
