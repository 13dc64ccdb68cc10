"""Takes decoded usage from every input, gives exact deltas: identity, copies, and the three accounting strategies."""

from coding_agent_exporter.ledger.accounts import PI_SOURCES as PI_SOURCES
from coding_agent_exporter.ledger.accounts import Changes as Changes
from coding_agent_exporter.ledger.accounts import Ledger as Ledger
from coding_agent_exporter.ledger.accounts import Saved as Saved
from coding_agent_exporter.ledger.accounts import SessionMeta as SessionMeta
from coding_agent_exporter.ledger.book import Book as Book
from coding_agent_exporter.ledger.book import clean as clean
