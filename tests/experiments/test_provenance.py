"""Where a number comes from, in a checkout and in a copy without git."""

import subprocess

from experiments import provenance


def test_a_copy_without_git_is_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("RBF_JAX_COMMIT", raising=False)
    assert provenance.provenance()["commit"] is None
    monkeypatch.setenv("RBF_JAX_COMMIT", "abc1234")
    assert provenance.provenance()["commit"] == "abc1234"


def test_a_checkout_knows_better(tmp_path, monkeypatch):
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("commit", "-q", "--allow-empty", "-m", "first")):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("RBF_JAX_COMMIT", "abc1234")
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert head.startswith(str(provenance.provenance()["commit"]))


def test_work_that_went_on_names_the_commits_of_all_sittings(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    crafted, scored = tmp_path / "crafted", tmp_path / "scored"
    found, both = [], [crafted, scored]
    for commit, folders in (("b2", [crafted]), ("a1", [crafted]), ("c3", both), ("c3", [scored]), ("b2", [])):
        monkeypatch.setenv("RBF_JAX_COMMIT", commit)
        found.append(provenance.provenance(*folders)["commit"])
    assert found == ["b2", "a1, b2", "a1, b2, c3", "c3", "b2"]
    # What did not change between the sittings is said once.
    assert provenance.provenance(crafted)["device"] == provenance.provenance()["device"]
