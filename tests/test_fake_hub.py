"""The real clients against the fake Hub: what the other tests rely on."""

from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from fake_hub import FakeHub
from huggingface_hub import HfApi, hf_hub_download, list_repo_tree, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError


REPO_ID = "tester/adapter"
FILES = {"README.md": b"---\nlicense: mit\n---\n# A card\n", "denoiser/config.json": b'{"layers": 2}'}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path, content in FILES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    return tmp_path


@pytest.fixture
def api(hub: FakeHub, folder: Path) -> HfApi:
    """A client whose Hub holds one repository with the files of `folder`."""
    api = HfApi()
    api.create_repo(REPO_ID)
    api.upload_folder(repo_id=REPO_ID, folder_path=folder)
    return api


def test_uploaded_folder_is_downloaded(api: HfApi, hub: FakeHub) -> None:
    assert {path: hub.files(REPO_ID)[path] for path in FILES} == FILES
    local = Path(snapshot_download(REPO_ID))
    assert {path: (local / path).read_bytes() for path in FILES} == FILES
    assert snapshot_download(REPO_ID, local_files_only=True) == str(local)


def test_one_file_is_added_and_deleted(api: HfApi, hub: FakeHub) -> None:
    api.upload_file(repo_id=REPO_ID, path_or_fileobj=b"1", path_in_repo="notes/one.txt")
    assert Path(hf_hub_download(REPO_ID, "notes/one.txt")).read_bytes() == b"1"
    api.delete_file("notes/one.txt", repo_id=REPO_ID)
    api.delete_folder("denoiser", repo_id=REPO_ID)
    assert hub.files(REPO_ID).keys() == {".gitattributes", "README.md"}


def test_unchanged_folder_makes_no_commit(api: HfApi, hub: FakeHub, folder: Path) -> None:
    before = api.repo_info(REPO_ID).sha
    hub.log.clear()
    assert api.upload_folder(repo_id=REPO_ID, folder_path=folder).oid == before
    assert not any("/commit/" in path for _, path in hub.log)


@pytest.mark.parametrize("upload", ["file", "folder"])
def test_pull_request_leaves_main_alone(api: HfApi, hub: FakeHub, folder: Path, upload: str) -> None:
    changed = folder / "README.md"
    changed.write_bytes(b"changed")
    if upload == "file":
        info = api.upload_file(repo_id=REPO_ID, path_or_fileobj=changed, path_in_repo="README.md", create_pr=True)
    else:
        info = api.upload_folder(repo_id=REPO_ID, folder_path=folder, create_pr=True)
    assert info.pr_revision == "refs/pr/1"
    assert hub.files(REPO_ID)["README.md"] == FILES["README.md"]
    assert hub.files(REPO_ID, ref="refs/pr/1")["README.md"] == b"changed"
    assert Path(hf_hub_download(REPO_ID, "README.md", revision="refs/pr/1")).read_bytes() == b"changed"
    refs = api.list_repo_refs(REPO_ID, include_pull_requests=True)
    assert [ref.ref for ref in refs.branches + refs.pull_requests] == ["refs/heads/main", "refs/pr/1"]


def test_listings(api: HfApi) -> None:
    assert [entry.path for entry in list_repo_tree(REPO_ID)] == ["denoiser", ".gitattributes", "README.md"]
    assert [entry.path for entry in list_repo_tree(REPO_ID, "denoiser")] == ["denoiser/config.json"]
    assert [entry.path for entry in api.get_paths_info(REPO_ID, ["README.md", "absent"])] == ["README.md"]
    assert api.file_exists(REPO_ID, "README.md") and not api.file_exists(REPO_ID, "absent")


def test_missing_things_raise_their_own_errors(api: HfApi) -> None:
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("tester/absent")
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(REPO_ID, revision="absent")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO_ID, "absent")
    api.delete_repo(REPO_ID)
    assert not api.repo_exists(REPO_ID)


def test_private_repository_needs_the_token(hub: FakeHub) -> None:
    api = HfApi()
    api.create_repo("tester/secret", private=True)
    assert api.repo_info("tester/secret").private
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("tester/secret", token=False)


def test_dataset_round_trip(hub: FakeHub) -> None:
    rows = {"text": ["where is my money", "has it shipped"], "label": [0, 1]}
    Dataset.from_dict(rows).push_to_hub("tester/intents", split="train")
    assert any(path.endswith(".parquet") for path in hub.files("tester/intents", kind="dataset"))
    assert load_dataset("tester/intents", split="train").to_dict() == rows
    assert list(load_dataset("tester/intents", split="train", streaming=True))[1] == {
        "text": rows["text"][1],
        "label": 1,
    }
