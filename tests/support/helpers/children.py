"""Scripts in processes of their own. This imports nothing of structlin."""

import json
import os
import subprocess
import sys
from pathlib import Path

ISOLATED = Path(__file__).parents[2] / "isolated.py"


def run(*arguments, stdin=None, cwd=None, **environment):
    """Run Python with these arguments, and more variables of the environment."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], input=stdin, cwd=cwd, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=590, check=False,
    )  # fmt: skip


def output(*arguments, **options):
    """What a process prints that has to end well."""
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def isolated(scripts, **environment):
    """Status and output of each of ``{name: script}``, which may crash (``tests/isolated.py``)."""
    return json.loads(output("-P", ISOLATED, stdin=json.dumps(scripts), **environment))


def assert_ran(found):
    status, printed = found
    assert status == 0, f"{'killed by signal' if status < 0 else 'status'} {abs(status)}\n{printed}"
