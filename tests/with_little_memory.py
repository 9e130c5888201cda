"""A script as a command, in a process that gets only so many more MB than its imports take. Run by
test_memory.py:

python tests/with_little_memory.py MB SCRIPT FLAGS OF THE SCRIPT
"""

import resource
import runpy
import sys
from pathlib import Path

import evaluate  # noqa: F401  what the scripts import is there before the limit is
import train  # noqa: F401

more = int(sys.argv[1]) * 10**6
del sys.argv[:2]
status = Path("/proc/self/status").read_text()
now = int(status.partition("VmSize:")[2].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))
runpy.run_path(sys.argv[0], run_name="__main__")
