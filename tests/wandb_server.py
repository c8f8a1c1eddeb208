"""A W&B server on 127.0.0.1 for one run, as far as it is opened, resumed and streamed to it. Its key can be revoked."""

import gzip
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.rows = []  # of the only run, as they came
        self.summary = {}
        self.opened = 0
        self.revoked = False
        self.delay = 0.0  # seconds before each answer

    @property
    def environment(self):
        return {"WANDB_MODE": "online", "WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": KEY}

    def answer(self, name, given):
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "me"}}
        bucket = {
            "id": "b", "name": given.get("name"), "displayName": "", "description": None, "config": "{}",
            "sweepName": None, "tags": [], "notes": None, "wandbConfig": '{"t": 1}', "summaryMetrics": "{}",
            "logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "historyLineCount": len(self.rows),
            "historyTail": json.dumps([json.dumps(self.rows[-1])] if self.rows else []), "project": project,
        }  # fmt: skip
        viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        if name == "Viewer":
            return {"viewer": viewer}
        if name == "RunResumeStatus":
            return {"model": {**project, "bucket": bucket if self.rows else None}}
        if name == "UpsertBucket":
            self.opened += given.get("config") is not None
            return {"upsertBucket": {"bucket": bucket, "inserted": not self.rows}}
        if name == "CreateRunFiles":
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
        return {"viewer": viewer, "serverInfo": {"features": []}, **self.project(bucket)}

    def project(self, bucket):
        """What the public API asks about a run."""
        step = self.rows[-1]["_step"] if self.rows else -1
        run = {
            "id": "b", "name": bucket["name"], "displayName": "", "tags": [], "state": "finished", "config": "{}",
            "createdAt": "2025-01-01T00:00:00Z", "heartbeatAt": "2025-01-01T00:00:00Z", "readOnly": False,
            "description": None, "notes": None, "summaryMetrics": "{}", "systemMetrics": "{}", "sweepName": None,
            "historyLineCount": len(self.rows), "historyKeys": {"lastStep": step}, "projectId": 1, "internalId": "1",
            "user": {"id": "u", "name": "me", "username": "me"}, "jobType": None, "group": None, "commit": None,
        }  # fmt: skip
        return {"project": {"internalId": "1", "run": run}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        time.sleep(self.server.delay)
        if self.server.revoked:
            self.send({"errors": [{"message": "user is not logged in"}]}, 401)
        elif self.path == "/graphql":
            asked = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            self.send({"data": self.server.answer(name[1] if name else "", asked.get("variables") or {})})
        else:
            if self.path.endswith("/file_stream"):
                self.take(json.loads(body).get("files") or {})
            self.send({"exitcode": None, "limits": {}})

    do_GET = do_PUT = do_POST  # noqa: N815

    def take(self, files):
        if rows := files.get("wandb-history.jsonl"):
            found = [json.loads(line) for line in rows["content"]]
            self.server.rows[rows["offset"] :] = found
        if summary := files.get("wandb-summary.json"):
            self.server.summary |= json.loads(summary["content"][-1])

    def send(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def server():
    serving = Server()
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    try:
        yield serving
    finally:
        serving.shutdown()
        serving.server_close()
