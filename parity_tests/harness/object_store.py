"""An object store on the loopback, and one in memory whose operations can be made to fail."""

import gc
import logging
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pytest
from fsspec.asyn import sync
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem
from moto.server import ThreadedMotoServer


@contextmanager
def serve_s3() -> Iterator[str]:
    """moto's S3 with one empty bucket, whose URL is yielded; the environment tells clients where it is."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "name",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        store = fsspec.get_filesystem_class("s3")
        store.clear_instance_cache()
        bucket = f"bucket-{uuid.uuid4().hex}"  # moto has one store for all servers of a process
        store().mkdir(bucket)
        try:
            yield f"s3://{bucket}"
        finally:
            _close_sessions(store)
            server.stop()
            with warnings.catch_warnings():  # what was left open, before another test collects it
                warnings.simplefilter("ignore", ResourceWarning)
                gc.collect()


def _close_sessions(store: type[AbstractFileSystem]) -> None:
    """Close the connections of all clients; s3fs itself gives up after 0.1 s and leaves a warning."""
    for client in list(store._cache.values()):
        if (session := client._s3) is not None:
            sync(client.loop, session.__aexit__, None, None, None)
    store.clear_instance_cache()


def memory_folder() -> str:
    """The URL of a new folder in memory."""
    return f"memory://{uuid.uuid4().hex}"


class Stopped(BaseException):
    """The process ended: not even what it does on errors is done."""


@contextmanager
def stop_after(operations: int) -> Iterator[list[str]]:
    """Within, the store in memory does so many changes, and then only raises `Stopped`.

    Yields the names of the changes that were done.
    """
    done: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pipe_file", "put_file", "rm", "rm_file"):
            original = getattr(MemoryFileSystem, name)

            def change(self, *args, _name=name, _original=original, **options):
                if len(done) >= operations:
                    raise Stopped
                done.append(_name)
                return _original(self, *args, **options)

            patch.setattr(MemoryFileSystem, name, change)
        yield done
