"""Collecting tests touches nothing outside of them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_server_is_started_in_the_users_own_data_directory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/acceptance/test_pipeline.py"],
        cwd=ROOT,
        env={**os.environ, "TIDEMARK_DATA_DIR": str(tmp_path / "data")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "data").exists()
