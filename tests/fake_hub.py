"""A Hugging Face Hub for tests: one process, 127.0.0.1, everything in memory, the standard library only.

The real clients (huggingface_hub, and with it diffusers, transformers, peft and datasets) talk to it over HTTP once
`HF_ENDPOINT` names it. Small files travel inside the commit; Parquet shards travel by LFS; Xet is not spoken.

    with FakeHub() as hub:
        ...                                             # with HF_ENDPOINT=hub.url and HF_TOKEN=TOKEN
        hub.files("tester/adapter", ref="refs/pr/1")    # {"adapter_config.json": b"..."}
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit


USER = "tester"
TOKEN = "hf_fake"
READER = "hf_reader"  # may see everything and change nothing
# `datasets` frees its shards between preupload and commit, so their bytes have to arrive before the commit does.
LFS_SUFFIXES = (".parquet",)

STRINGS = ("library_name", "license", "pipeline_tag", "base_model", "base_model_relation")
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "other")

REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"
REVISION = r"(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+)"


class RawAnswer(NamedTuple):
    """An answer that is more than JSON and a 200."""

    body: bytes
    status: int
    headers: dict[str, str]


@dataclass
class Fault:
    """A connection that is lost once, at the first request whose method and path fit.

    Attributes:
        method (`str`): The request's.
        part (`str`): What its path contains.
        served (`bool`): Whether the Hub does what was asked, and only its answer is lost.
        hold (`bool`, *optional*, defaults to `False`): Whether nothing more happens until `over` is set.
        reached, over (`threading.Event`): Set by the Hub when the request is there; set by the test.
    """

    method: str
    part: str
    served: bool
    hold: bool = False
    reached: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)


class HubError(Exception):
    """An answer that the clients turn into an exception of theirs, by its status and its `X-Error-Code`."""

    def __init__(self, status: int, code: str, commit: str | None = None, **about: str) -> None:
        super().__init__(code)
        headers = {"X-Error-Code": code} if commit is None else {"X-Error-Code": code, "X-Repo-Commit": commit}
        self.answer = RawAnswer(json.dumps({"error": code, **about}).encode(), status, headers)


class Request(NamedTuple):
    """What an endpoint reads: the groups of its route's pattern, the query, the headers and the body."""

    groups: dict[str, str]
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes

    @property
    def kind(self) -> str:
        return self.groups.get("kind", "models").removesuffix("s")

    def authorize(self, write: bool = False) -> None:
        """Whoever may not see a repository is told that there is none, as on the real Hub."""
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        if token not in (TOKEN, READER):
            raise HubError(401, "RepoNotFound")
        if write and token == READER:
            raise HubError(403, "Forbidden")

    def spec(self) -> tuple[str, str, dict[str, Any]]:
        """The kind and the id of a repository to create or delete, and all else that was said of it."""
        self.authorize(write=True)
        spec = json.loads(self.body)
        return spec.get("type", "model"), f"{spec['organization'] or USER}/{spec['name']}", spec

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")


class Repository:
    """The refs of a repository, every commit's files in full, and the titles of its pull requests."""

    def __init__(self, name: str, private: bool) -> None:
        self.name = name
        self.private = private
        self.refs: dict[str, str] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.pull_requests: list[str] = []
        self.commit("main", {".gitattributes": b""}, "initial commit")

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a pull request's ref or a hash names."""
        commit = self.refs.get(revision, revision)
        if commit not in self.commits:
            raise HubError(404, "RevisionNotFound")
        return commit

    def commit(self, ref: str, files: dict[str, bytes], message: str) -> str:
        # The hash follows from the content, because the clients' caches outlive a test and are keyed by it.
        digests = sorted((path, object_id(path, blob)) for path, blob in files.items())
        commit = hashlib.sha1(repr((self.name, self.refs.get(ref), message, digests)).encode()).hexdigest()
        self.commits[commit], self.refs[ref] = files, commit
        return commit

    def open_pull_request(self, title: str) -> int:
        self.pull_requests.append(title)
        self.refs[f"refs/pr/{len(self.pull_requests)}"] = self.refs["main"]
        return len(self.pull_requests)


def object_id(path: str, blob: bytes) -> str:
    """The hash by which a client knows that its file is on the Hub already."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(blob).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()


def metadata_errors(content: str) -> list[str]:
    """What the real Hub has against the metadata of a card, as far as these tests could meet it."""
    import yaml  # huggingface_hub brings it

    block = re.match(r"---\n(.*?)\n---\n", content, flags=re.DOTALL)
    values = yaml.safe_load(block[1]) if block else {}
    errors = [f'"{name}" must be a string' for name in STRINGS if not isinstance(values.get(name, ""), str)]
    if values.get("license", "mit") not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if values.get("base_model_relation", "adapter") not in ("adapter", "finetune", "merge", "quantized"):
        errors.append('"base_model_relation" must be one of adapter, finetune, merge, quantized')
    if not all(isinstance(tag, str) for tag in values.get("tags", [])):
        errors.append('"tags" must be strings')
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", values.get("base_model", "a/b")):
        errors.append(f'"base_model" with value "{values["base_model"]}" is not valid. Use a model id.')
    return errors


def file_entry(path: str, blob: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(blob), "oid": object_id(path, blob)}


Endpoint = Callable[["FakeHub", Request], Any]
ROUTES: list[tuple[str, str, Endpoint]] = []


def route(method: str, pattern: str) -> Callable[[Endpoint], Endpoint]:
    def register(endpoint: Endpoint) -> Endpoint:
        ROUTES.append((method, pattern, endpoint))
        return endpoint

    return register


class FakeHub(ThreadingHTTPServer):
    """The Hub: its repositories, the blobs uploaded by LFS, and a log of `(method, path)` of every request.

    An endpoint returns what is sent as JSON, or a `RawAnswer`.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()
        self.repos: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.faults: list[Fault] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def clear(self) -> None:
        with self.lock:
            for held in (self.repos, self.blobs, self.log, self.faults):
                held.clear()

    def files(self, repo_id: str, kind: str = "model", ref: str = "main") -> dict[str, bytes]:
        """Every file of a repository at a ref or commit, the `.gitattributes` it was born with included."""
        repo = self.repos[kind, repo_id]
        return repo.commits[repo.resolve(ref)]

    def dispatch(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Any:
        url = urlsplit(path)
        with self.lock:
            self.log.append((method, path))
            for wanted, pattern, endpoint in ROUTES:
                match = re.fullmatch(pattern, unquote(url.path))
                if match and wanted == {"HEAD": "GET"}.get(method, method):
                    groups = {name: text for name, text in match.groupdict().items() if text is not None}
                    return endpoint(self, Request(groups, parse_qs(url.query), headers, body))
        raise HubError(404, "NoSuchEndpoint", endpoint=f"{method} {url.path}")

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault that a request meets, which then is used up."""
        with self.lock:
            for one in self.faults:
                if one.method == method and one.part in path:
                    self.faults.remove(one)
                    return one
        return None

    def page(self, kind: str, repo_id: str) -> str:
        return f"{self.url}/{repo_id}" if kind == "model" else f"{self.url}/{kind}s/{repo_id}"

    def find(self, request: Request, write: bool = False) -> tuple[Repository, str, dict[str, bytes]]:
        """The repository, the commit and the files that a request names, if its sender may see (or change) them."""
        repo = self.repos.get((request.kind, request.groups["repo_id"]))
        if repo is None or repo.private or write:
            request.authorize(write)
        if repo is None:
            raise HubError(404, "RepoNotFound")
        commit = repo.resolve(request.groups.get("revision", "main"))
        return repo, commit, repo.commits[commit]

    # Accounts and repositories
    @route("GET", "/api/whoami-v2")
    def who_am_i(self, request: Request) -> Any:
        request.authorize()
        return {"type": "user", "name": USER, "fullname": USER, "orgs": []}

    @route("POST", "/api/repos/create")
    def create_repo(self, request: Request) -> Any:
        kind, repo_id, spec = request.spec()
        answer = {"url": self.page(kind, repo_id), "name": repo_id}
        if (kind, repo_id) in self.repos:
            raise HubError(409, "RepoExists", **answer)
        self.repos[kind, repo_id] = Repository(
            repo_id, private=spec.get("private") or spec.get("visibility") == "private"
        )
        return answer

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self, request: Request) -> Any:
        if self.repos.pop(request.spec()[:2], None) is None:
            raise HubError(404, "RepoNotFound")
        return {}

    @route("GET", f"{REPO}(?:/revision/{REVISION})?")
    def repo_info(self, request: Request) -> Any:
        repo, commit, files = self.find(request)
        siblings = [{"rfilename": path} for path in sorted(files)]
        info = {"id": repo.name, "sha": commit, "private": repo.private, "tags": [], "siblings": siblings}
        return {**info, "downloads": 0, "likes": 0}

    @route("GET", f"{REPO}/refs")
    def list_refs(self, request: Request) -> Any:
        answer: dict[str, list[dict[str, str]]] = {"branches": [], "pullRequests": [], "converts": [], "tags": []}
        for name, commit in self.find(request)[0].refs.items():
            key, ref = ("pullRequests", name) if name.startswith("refs/pr/") else ("branches", f"refs/heads/{name}")
            answer[key].append({"name": name, "ref": ref, "targetCommit": commit})
        return answer

    # Reading files
    @route("GET", f"{REPO}/tree/{REVISION}(?:/(?P<folder>.*))?")
    def list_tree(self, request: Request) -> Any:
        _, _, files = self.find(request)
        folder = request.groups.get("folder", "").strip("/")
        prefix = f"{folder}/" if folder else ""
        below = [path for path in sorted(files) if path.startswith(prefix)]
        if folder and not below:
            raise HubError(404, "EntryNotFound")
        inner = [path.removeprefix(prefix).split("/") for path in below]
        depths = [len(parts) if request.flag("recursive") else 1 for parts in inner]
        listed = sorted(
            {prefix + "/".join(parts[:end]) for parts, most in zip(inner, depths) for end in range(1, most + 1)}
        )
        folders = [{"type": "directory", "path": path, "oid": "0" * 40} for path in listed if path not in files]
        return folders + [file_entry(path, files[path]) for path in listed if path in files]

    @route("POST", f"{REPO}/paths-info/{REVISION}")
    def paths_info(self, request: Request) -> Any:
        _, _, files = self.find(request)
        return [file_entry(path, files[path]) for path in parse_qs(request.body.decode())["paths"] if path in files]

    @route("GET", f"(?:/(?P<kind>datasets|spaces))?/(?P<repo_id>[^/]+/[^/]+)/resolve/{REVISION}/(?P<path>.+)")
    def read_file(self, request: Request) -> Any:
        _, commit, files = self.find(request)
        path = request.groups["path"]
        if path not in files:
            raise HubError(404, "EntryNotFound", commit)  # the client remembers what a commit does not have
        blob = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{object_id(path, blob)}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if wanted is None:
            return RawAnswer(blob, 200, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(blob)), len(blob) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(blob)}"
        return RawAnswer(blob[first : last + 1], 206, headers)

    # Writing files
    @route("POST", "/api/validate-yaml")
    def validate_card(self, request: Request) -> Any:
        if errors := metadata_errors(json.loads(request.body)["content"]):
            raise HubError(400, "InvalidMetadata", errors=[{"message": error} for error in errors])
        return {"errors": [], "warnings": []}

    @route("POST", f"{REPO}/preupload/{REVISION}")
    def preupload(self, request: Request) -> Any:
        _, _, known = self.find(request, write=True)
        files = [{"path": wanted["path"], "shouldIgnore": False} for wanted in json.loads(request.body)["files"]]
        for file in files:
            file["uploadMode"] = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            file["oid"] = object_id(file["path"], known[file["path"]]) if file["path"] in known else None
        return {"files": files}

    @route("POST", r"(?:/datasets|/spaces)?/[^/]+/[^/]+\.git/info/lfs/objects/batch")
    def lfs_batch(self, request: Request) -> Any:
        objects = json.loads(request.body)["objects"]
        for item in objects:
            if item["oid"] not in self.blobs:
                item["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_upload(self, request: Request) -> Any:
        self.blobs[request.groups["oid"]] = request.body
        return {}

    @route("POST", f"{REPO}/commit/{REVISION}")
    def commit(self, request: Request) -> Any:
        repo, parent, files = self.find(request, write=True)
        header, *operations = map(json.loads, request.body.splitlines())
        if header["value"].get("parentCommit", parent) != parent:
            raise HubError(412, "ParentCommitChanged")
        files = dict(files)
        for operation in operations:
            key, value, path = operation["key"], operation["value"], operation["value"]["path"]
            if key == "file":
                files[path] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[path] = self.blobs[value["oid"]]
            elif key in ("deletedFile", "deletedFolder"):
                files = {kept: files[kept] for kept in files if not f"{kept}/".startswith(path.rstrip("/") + "/")}
            else:
                raise HubError(400, "NoSuchOperation", operation=key)
        title, ref, page = header["value"]["summary"], request.groups["revision"], self.page(request.kind, repo.name)
        extra = {}
        if request.flag("create_pr"):
            number = repo.open_pull_request(title)
            ref, extra = f"refs/pr/{number}", {"pullRequestUrl": f"{page}/discussions/{number}"}
        commit = repo.commit(ref, files, title)
        return {"success": True, "commitOid": commit, "commitUrl": f"{page}/commit/{commit}", **extra}

    @route("POST", f"{REPO}/discussions")
    def open_pull_request(self, request: Request) -> Any:
        return {"num": self.find(request, write=True)[0].open_pull_request(json.loads(request.body)["title"])}

    @route("GET", f"{REPO}/discussions/(?P<number>[0-9]+)")
    def pull_request(self, request: Request) -> Any:
        repo, number = self.find(request)[0], int(request.groups["number"])
        about = {"num": number, "title": repo.pull_requests[number - 1], "isPullRequest": True, "status": "open"}
        place = {"author": {"name": USER}, "repo": {"name": repo.name, "type": request.kind}, "events": []}
        changes = {"filesWithConflicts": [], "changes": {"base": "refs/heads/main"}}
        return {**about, **place, **changes, "createdAt": "2026-01-01T00:00:00.000Z"}


class Handler(BaseHTTPRequestHandler):
    """HTTP for a `FakeHub`: reads a request, lets the Hub answer, writes the answer."""

    server: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a body waits until its headers, a packet of their own, are acknowledged

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are kept in `FakeHub.log`, not printed."""

    def handle_any(self) -> None:
        headers = {name.lower(): text for name, text in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))  # the clients do not send chunks
        fault = self.server.fault(self.command, self.path)
        if fault is not None:
            self.close_connection = True
            if fault.served:
                self.server.dispatch(self.command, self.path, headers, body)
            fault.reached.set()
            if fault.hold:
                fault.over.wait(timeout=60)
            return
        try:
            answer = self.server.dispatch(self.command, self.path, headers, body)
        except HubError as error:
            answer = error.answer
        except Exception as error:  # as a 4xx, because the clients retry a 5xx or a lost connection for 20 seconds
            answer = HubError(400, "FakeHubFailed", cause=repr(error)).answer
        if not isinstance(answer, RawAnswer):
            answer = RawAnswer(json.dumps(answer).encode(), 200, {"Content-Type": "application/json"})
        self.send_response(answer.status)
        for name, text in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any
