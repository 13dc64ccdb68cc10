"""Takes decoded usage from every input, gives exact deltas: identity, copies, and the three accounting strategies."""

from coding_agent_exporter.ledger.accounts import CUMULATIVE as CUMULATIVE
from coding_agent_exporter.ledger.accounts import INCREMENTAL as INCREMENTAL
from coding_agent_exporter.ledger.accounts import PI as PI
from coding_agent_exporter.ledger.accounts import PI_SOURCES as PI_SOURCES
from coding_agent_exporter.ledger.accounts import Ledger as Ledger
from coding_agent_exporter.ledger.accounts import owner as owner
from coding_agent_exporter.ledger.accounts import pi_session as pi_session
from coding_agent_exporter.ledger.book import Book as Book
from coding_agent_exporter.ledger.book import clean as clean
from coding_agent_exporter.ledger.changes import Archived as Archived
from coding_agent_exporter.ledger.changes import Changes as Changes
from coding_agent_exporter.ledger.changes import Saved as Saved
from coding_agent_exporter.ledger.changes import SessionMeta as SessionMeta
from coding_agent_exporter.ledger.changes import Storage as Storage
