import shutil
import subprocess
from pathlib import Path

import pytest
from boostdiff.engine.versions import source_commit

GIT = shutil.which("git")


@pytest.mark.skipif(GIT is None, reason="git is not installed")
def test_a_clone_tells_its_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        command = [str(GIT), "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert source_commit(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--message", "first")
    assert source_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("two")
    assert source_commit(tmp_path) == f"{git('rev-parse', 'HEAD')}-dirty"
    # What is installed somewhere inside a clone is not that clone.
    (tmp_path / "inside").mkdir()
    assert source_commit(tmp_path / "inside") is None
