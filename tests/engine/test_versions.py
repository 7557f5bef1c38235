import shutil
import subprocess
from pathlib import Path

import pytest
from boostdiff.engine.versions import source_commit, usable_cpus, versions

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


def test_a_library_is_found_under_its_import_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "some_library_gpu-1.2.3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: some-library-gpu\nVersion: 1.2.3\n")
    (about / "top_level.txt").write_text("some_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = versions("some_library", "no_such_library")
    assert found["some_library"] == "1.2.3"
    assert "torch" in found
    assert "no_such_library" not in found


def test_a_process_may_use_the_cpus_that_it_is_bound_to_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {5, 7}, raising=False)
    assert usable_cpus() == 2
    # macOS, Windows.
    monkeypatch.delattr("os.sched_getaffinity")
    assert usable_cpus() == 3
