"""The state file as a crash leaves it, at every commit and in between, and as broken disks and people leave it."""

from __future__ import annotations

from pathlib import Path

from coding_agent_exporter.pipeline import Pipeline
from crash_support import Fleet
from process_support import fallen
from support import drain, scrape, settings


def test_a_disk_that_is_full_at_the_start_hides_no_counter(tmp_path: Path) -> None:
    """What was committed before is shown, and stands still until there is room."""
    fleet = Fleet(tmp_path, 1)
    for _ in range(100):
        fleet.act()
    pipeline = Pipeline(settings(tmp_path, *fleet.flags))
    drain(pipeline)
    scrape(pipeline)
    before = scrape(pipeline)
    pipeline.close()
    fleet.finish()
    pipeline = Pipeline(settings(tmp_path, *fleet.flags))
    pipeline._store._db.execute("PRAGMA max_page_count = 1")
    pipeline._store._db.execute("PRAGMA query_only = ON")
    during = scrape(pipeline)
    assert pipeline.pending_commit
    assert fallen({key: value for key, value in before.items() if value}, during) == []
    pipeline._store._db.execute("PRAGMA query_only = OFF")
    scrape(pipeline)
    after = scrape(pipeline)
    assert fallen(during, after) == []
    assert fleet.differences(after) == []
    pipeline.close()
