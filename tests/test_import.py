"""What ``import constrained_ops`` costs and brings along."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys, time, torch
before, start = set(sys.modules), time.process_time()
import constrained_ops
print(time.process_time() - start, *{name.partition(".")[0] for name in set(sys.modules) - before})
"""


def test_import_is_fast_and_needs_no_other_package() -> None:
    """At most 0.3 s of CPU time over torch's own seconds; Triton and all that is optional waits until it is needed."""
    outcome = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    seconds, *brought = outcome.stdout.split()
    assert float(seconds) < 0.3
    assert {name for name in brought if not name.startswith("__editable__")} == {"constrained_ops"}
