"""A real S3 server (moto's) that a test may take away and bring back; it keeps its objects meanwhile."""

from __future__ import annotations

import contextlib
import urllib.request
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.mlflow_server import free_port

BUCKET = "runs"


class S3Server:
    """It has one address all its life. The objects are in this process's memory."""

    def __init__(self) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._server: ThreadedMotoServer | None = None
        self.start()
        urllib.request.urlopen(f"http://{self.address}/moto-api/reset", data=b"").close()  # of other tests' objects
        self.client: Any = boto3.client("s3", endpoint_url=f"http://{self.address}", region_name="us-east-1")
        self.client.create_bucket(Bucket=BUCKET)

    def start(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()

    def stop(self) -> None:
        """It refuses connections from now on."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def uri(self, path: str) -> str:
        return f"s3://{BUCKET}/{path}?endpoint_override={self.address}&scheme=http&region=us-east-1"

    def names(self, prefix: str) -> set[str]:
        """The names of the objects below a run's folder."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
        found = (item["Key"] for page in pages for item in page.get("Contents", ()))
        return {key.removeprefix(f"{prefix}/") for key in found if not key.endswith("/")}

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def write(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content)


@contextlib.contextmanager
def serve_s3() -> Iterator[S3Server]:
    """A server, with credentials for it in the environment of this process and of those that it starts."""
    with pytest.MonkeyPatch.context() as environment:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "testing")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server = S3Server()
        try:
            yield server
        finally:
            server.stop()
