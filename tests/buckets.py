"""A real S3 server (moto, in a process of its own), and a proxy before it that fails on request."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlencode

import requests
from boto3.session import Session

from sandbox.server import Exchange, ReceivedRequest, Server

KEY_ID, SECRET = "the-key-id", "the/secret+access-key"
REFUSED = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>no, %s</Message></Error>"
CODES = {500: b"InternalError", 501: b"NotImplemented", 503: b"SlowDown", 403: b"AccessDenied", 429: b"TooMany"}


@dataclass
class S3Fault:
    """What happens to the next `times` requests with this method whose path contains `on`.

    A number is the status of the answer. "cut": the storage never gets the request, and there is no answer. "lost": the
    storage gets it, and the answer is lost. "hold": no answer for as long as the proxy runs.
    """

    what: int | Literal["cut", "lost", "hold"]
    method: str = "PUT"
    on: str = ""
    times: int = 1_000_000

    def applies_to(self, asked: ReceivedRequest) -> bool:
        return self.times > 0 and asked.method == self.method and self.on in asked.path


class FaultyProxy(Server):
    """A proxy between a worker and the storage. It forwards every request, except for the faults."""

    def __init__(self, storage: str) -> None:
        super().__init__()
        self.storage = storage
        self.faults: list[S3Fault] = []
        self.holding = threading.Event()
        self._lock = threading.Lock()

    def answer(self, exchange: Exchange) -> None:
        asked = exchange.asked
        with self._lock:
            fault = next((fault for fault in self.faults if fault.applies_to(asked)), None)
            if fault is not None:
                fault.times -= 1
        if fault is None:
            self._forward(exchange)
        elif fault.what == "hold":
            self.holding.set()
            exchange.hold()
            exchange.cut()
        elif isinstance(fault.what, int):
            exchange.send(fault.what, REFUSED % (CODES[fault.what], SECRET.encode()))
        else:
            if fault.what == "lost":
                self._ask(asked)
            exchange.cut()

    def puts(self) -> list[str]:
        """The keys of all PUT requests, in order."""
        return [asked.path.split("/", 2)[2] for asked in list(self.asked) if asked.method == "PUT"]

    def _forward(self, exchange: Exchange) -> None:
        answer = self._ask(exchange.asked)
        headers = {name.lower(): value for name, value in answer.headers.items()}
        for ours in ("connection", "transfer-encoding", "content-length", "server", "date"):
            if (exchange.asked.method, ours) != ("HEAD", "content-length"):  # there it is the object's
                headers.pop(ours, None)
        exchange.send(answer.status_code, answer.content, headers)

    def _ask(self, asked: ReceivedRequest) -> requests.Response:
        query = f"?{urlencode(asked.query)}" if asked.query else ""
        headers = {name: value for name, value in asked.headers.items() if name not in ("connection", "expect")}
        with requests.Session() as session:
            session.trust_env = False
            return session.request(
                asked.method, f"{self.storage}{asked.path}{query}", headers=headers, data=asked.body, timeout=30
            )


class S3Server:
    """The server as its owner uses it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.s3: Any = self._client("s3")
        self._buckets = 0

    def new_bucket(self) -> str:
        self._buckets += 1
        name = f"results-{self._buckets}"
        self.s3.create_bucket(Bucket=name)
        return name

    def keys(self, bucket: str) -> list[str]:
        return [found["Key"] for found in self.s3.list_objects_v2(Bucket=bucket).get("Contents", [])]

    def unfinished(self, bucket: str) -> list[str]:
        """Keys of multipart uploads that were neither completed nor aborted: they cost money for ever."""
        return [found["Key"] for found in self.s3.list_multipart_uploads(Bucket=bucket).get("Uploads", [])]

    def publish(self, bucket: str) -> None:
        """Let anyone read."""
        everyone = {
            "Effect": "Allow",
            "Principal": "*",
            "Action": "s3:GetObject",
            "Resource": f"arn:aws:s3:::{bucket}/*",
        }
        self.s3.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [everyone]}))

    @contextlib.contextmanager
    def checking_keys(self) -> Iterator[tuple[str, str]]:
        """A key that is good; inside the block every other one is refused."""
        iam: Any = self._client("iam")
        allowed = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
        iam.create_user(UserName="worker")
        iam.put_user_policy(UserName="worker", PolicyName="s3", PolicyDocument=json.dumps(allowed))
        key = iam.create_access_key(UserName="worker")["AccessKey"]
        iam.close()
        self._free_requests("0")
        try:
            yield key["AccessKeyId"], key["SecretAccessKey"]
        finally:
            self._free_requests("inf")

    def _free_requests(self, count: str) -> None:
        requests.post(f"{self.url}/moto-api/reset-auth", data=count.encode(), timeout=10).raise_for_status()

    def _client(self, service: str) -> Any:
        session: Any = Session(KEY_ID, SECRET, region_name="us-east-1")
        return session.client(service, endpoint_url=self.url)


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """The server, up until the block ends."""
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            output = []
            for line in process.stderr:
                output.append(line)
                if found := re.search(r"Running on (http://[0-9.:]+)", line):
                    break
            else:
                raise AssertionError("".join(output))
            log = threading.Thread(target=process.stderr.read, daemon=True)  # unread, it would block the server
            log.start()
            it = S3Server(found[1])
            yield it
            it.s3.close()
        finally:
            process.kill()
        log.join()
