"""A Hub of one model repository on this machine, for clients that are given its address in HF_ENDPOINT."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from answers import Answer, answering


@dataclass
class Hub:
    """Its files by name, the commit of its branch main, the answers it gives first, and the paths it was asked for."""

    files: Mapping[str, bytes]
    commit: str
    first: list[int] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def respond(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        path = urlsplit(target).path
        self.asked.append(path)
        if self.first:
            return self.first.pop(0), b"{}", {}
        if path.startswith(f"/org/name/resolve/{self.commit}/"):
            content = self.files.get(path.rpartition("/")[2])
            if content is not None:
                etag = hashlib.sha1(content).hexdigest()
                return 200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit}
        if path == f"/api/models/org/name/tree/{self.commit}":
            tree = [self._entry(name, content) for name, content in self.files.items()]
            return 200, json.dumps(tree).encode(), {"Content-Type": "application/json"}
        if path in ("/api/models/org/name", "/api/models/org/name/revision/main"):
            info = {"id": "org/name", "sha": self.commit, "siblings": [{"rfilename": name} for name in self.files]}
            return 200, json.dumps(info).encode(), {"Content-Type": "application/json"}
        return 404, b"{}", {"X-Error-Code": "RepoNotFound"}

    def _entry(self, name: str, content: bytes) -> dict[str, object]:
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def serving_hub(files: Mapping[str, bytes], commit: str) -> Iterator[Hub]:
    hub = Hub(files, commit)
    with answering(hub.respond) as hub.url:
        yield hub
