"""Sources in a temporary file: by name, as they were, any number of times."""

import os
import subprocess
import sys
from pathlib import Path

from wan_data.sources.source import SourceFile
from wan_data.sources.source_table import SourceTable

SOURCES = [
    SourceFile("a/b.mp4", Path("/clips/a/b.mp4"), "A caption."),
    SourceFile("list.jsonl line 3", None, problem="it has no path"),
    SourceFile("odd", Path(os.fsdecode(b"/clips/\xff.mp4")), problem="its name is not valid Unicode"),
    SourceFile("ü elsewhere.mp4", Path("/other/ü elsewhere.mp4")),
]


def test_sources_come_back_by_name_as_they_were():
    table = SourceTable(Path("/clips"), reversed(SOURCES))
    assert (len(table), list(table), list(table)) == (4, SOURCES, SOURCES)
    assert not table.add(SourceFile("odd", Path("/another")))
    assert (len(table), table.find("odd"), table.find("no")) == (4, SOURCES[2], None)
    first, second = iter(table), iter(table)
    assert [next(first), next(second), next(first)] == [SOURCES[0], SOURCES[0], SOURCES[1]]


# In a process of its own: pathlib interns names, and how far Python's table of these grows depends on what a process
# has interned before.
MEASURED = """
import sys, tracemalloc
from pathlib import Path
from wan_data.sources.listing import files_of_listing
tracemalloc.start()
sources = files_of_listing(Path(sys.argv[1]))
seen = sum(len(str(source.caption)) for source in sources)
print(len(sources), seen, tracemalloc.get_traced_memory()[1])
"""


def test_a_long_listing_takes_no_memory_for_its_rows(tmp_path):
    listing = tmp_path / "list.jsonl"
    with listing.open("w") as file:
        for number in range(30_000):
            file.write(f'{{"video": "{number:06d}.mp4", "caption": "{"A rabbit. " * 20}"}}\n')
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(listing)], capture_output=True, text=True, timeout=120, check=True
    )
    *counts, peak = map(int, done.stdout.split())
    assert counts == [30_000, 30_000 * 200]
    assert peak < 2 << 20, "the text of the rows has 6 MB"
