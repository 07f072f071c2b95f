"""/v1/files and /v1/batches with OpenAI's client, against real servers that are killed and started again."""

import io
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server_process import ServerProcess

ENDED = ("completed", "failed", "expired", "cancelled")


def row(id: Any, **body: Any) -> str:
    content = {"model": "tiny", "prompt": f"Once {id}", "max_tokens": 8, "temperature": 0, "ignore_eos": True} | body
    return json.dumps({"custom_id": str(id), "method": "POST", "url": "/v1/completions", "body": content}) + "\n"


def upload(client: openai.OpenAI, text: str) -> str:
    return client.files.create(file=("rows.jsonl", io.BytesIO(text.encode())), purpose="batch").id


def create(client: openai.OpenAI, file: str, **more: Any) -> Any:
    return client.batches.create(input_file_id=file, endpoint="/v1/completions", completion_window="24h", **more)


def begin(client: openai.OpenAI, text: str, **more: Any) -> Any:
    return create(client, upload(client, text), **more)


def until_ended(client: openai.OpenAI, id: str) -> Any:
    deadline = time.monotonic() + 60
    while (batch := client.batches.retrieve(id)).status not in ENDED:
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)
    return batch


def lines(client: openai.OpenAI, file: str | None) -> list[Any]:
    assert file is not None
    return [json.loads(line) for line in client.files.content(file).text.splitlines()]


def texts(client: openai.OpenAI, file: str | None) -> dict[str, str]:
    return {each["custom_id"]: each["response"]["body"]["choices"][0]["text"] for each in lines(client, file)}


def connect(server: ServerProcess, tenant: str = "") -> openai.OpenAI:
    headers = {"X-Octavo-Tenant": tenant} if tenant else {}
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60, default_headers=headers
    )


@pytest.fixture(scope="module")
def stored(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("data")
    with ServerProcess(tiny_llama, "--data-dir", str(folder), "--max-file-bytes", "100000") as server:
        yield server


@pytest.fixture(scope="module")
def client(stored: ServerProcess) -> Iterator[openai.OpenAI]:
    with connect(stored) as client:
        yield client


def test_a_batch(client: openai.OpenAI) -> None:
    given = row("good") + row("wrong", temperature=-1) + "not JSON\n" + row("good") + row(4)
    begun = begin(client, given, metadata={"kind": "test"})
    assert begun.status == "validating" and begun.expires_at - begun.created_at == 86400
    batch = until_ended(client, begun.id)
    assert (batch.status, batch.metadata, batch.errors) == ("completed", {"kind": "test"}, None)
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (5, 2, 3)
    assert [each["custom_id"] for each in lines(client, batch.output_file_id)] == ["good", "4"]
    errors = lines(client, batch.error_file_id)
    assert [each["custom_id"] for each in errors] == ["wrong", None, "good"]
    assert errors[0]["response"]["status_code"] == 400
    assert [each["error"]["code"] for each in errors[1:]] == ["invalid_line", "duplicate_custom_id"]
    body = {"model": "tiny", "prompt": "Once good", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = client.post("/completions", body=body, cast_to=openai.types.Completion)
    assert texts(client, batch.output_file_id)["good"] == answer.choices[0].text
    assert batch.id in [each.id for each in client.batches.list(limit=1)]


def test_files(client: openai.OpenAI, stored: ServerProcess) -> None:
    first, second = upload(client, "one"), upload(client, "two")
    assert [each.id for each in client.files.list(order="asc", after=first)] == [second]
    assert [each.id for each in client.files.list(limit=1)][:2] == [second, first]
    described = client.files.retrieve(first)
    assert (described.bytes, described.filename, described.purpose) == (3, "rows.jsonl", "batch")
    with connect(stored, "other") as other:
        assert other.files.list().data == []
        for action in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError):
                action(first)
        with pytest.raises(openai.NotFoundError):
            other.batches.create(input_file_id=first, endpoint="/v1/completions", completion_window="24h")
        with pytest.raises(openai.NotFoundError):
            other.batches.retrieve(client.batches.list().data[0].id)
    assert client.files.content(first).text == "one"
    assert client.files.delete(first).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(first)
    with pytest.raises(openai.APIStatusError, match="max_file_bytes"):
        upload(client, "x" * 200_000)


def test_cancel(client: openai.OpenAI) -> None:
    begun = begin(client, "".join(row(id, max_tokens=400) for id in range(500)))
    while client.batches.retrieve(begun.id).status != "in_progress":
        time.sleep(0.01)
    assert client.batches.cancel(begun.id).status in ("cancelling", "cancelled")
    batch = until_ended(client, begun.id)
    assert batch.status == "cancelled" and batch.request_counts.completed < 500
    done = len(lines(client, batch.output_file_id)) if batch.output_file_id else 0
    assert done == batch.request_counts.completed
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(begun.id)


def test_what_is_refused(client: openai.OpenAI, stored: ServerProcess) -> None:
    file = upload(client, row(1))
    right = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    wrong = [
        ({"endpoint": "/v1/other"}, 400), ({"completion_window": "1h"}, 400), ({"input_file_id": "file-x"}, 404),
        ({"input_file_id": 5}, 400), ({"metadata": {"a": 1}}, 400), ({"priority": 1}, 400),
    ]  # fmt: skip
    for change, status in wrong:
        assert httpx.post(f"{stored.url}/v1/batches", json=right | change).status_code == status, change
    files = f"{stored.url}/v1/files"
    refused = httpx.post(files, params={"tenant": "日本"}, files={"file": b"{}"}, data={"purpose": "batch"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tenant")
    assert httpx.post(files, json={}).status_code == 415
    assert httpx.post(files, files={"other": b"x"}).status_code == 400
    assert httpx.post(files, files={"file": b"x"}, data={"purpose": "none"}).status_code == 400
    for query in ("limit=0", "limit=x", "order=up"):
        assert httpx.get(f"{files}?{query}").status_code == 400
    empty = begin(client, "\n")
    assert until_ended(client, empty.id).status == "failed"


def test_without_a_data_folder(server: ServerProcess) -> None:
    reply = httpx.get(f"{server.url}/v1/batches")
    assert reply.status_code == 404 and "--data-dir" in reply.text


def test_kill_and_restart(tiny_llama: Path, tmp_path: Path) -> None:
    flags = ("--data-dir", str(tmp_path), "--max-batch-size", "8", "--threads", "1")
    count = 150
    killed = ServerProcess(tiny_llama, *flags).__enter__()
    with connect(killed) as client:
        begun = begin(client, "".join(row(id, max_tokens=24) for id in range(count)))
        while not (done := sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("batches/*.results"))):
            time.sleep(0.005)
        assert done < count
        killed.signal(signal.SIGKILL)
        killed.process.wait()
    unrecorded = [tmp_path / "files" / "file-1", tmp_path / "batches" / "batch_1.input"]
    for path in unrecorded:
        path.write_text("{}")
    with ServerProcess(tiny_llama, *flags) as server, connect(server) as client:
        assert not any(path.exists() for path in unrecorded)
        batch = until_ended(client, begun.id)
        assert (batch.status, batch.request_counts.completed) == ("completed", count)
        got = lines(client, batch.output_file_id)
        assert [each["custom_id"] for each in got] == [str(id) for id in range(count)]
        whole = until_ended(client, begin(client, "".join(row(id, max_tokens=24) for id in range(count))).id)
        assert texts(client, whole.output_file_id) == texts(client, batch.output_file_id)


def test_limits_of_a_tenant(tiny_llama: Path, tmp_path: Path) -> None:
    limits = ("--max-files", "4", "--max-stored-bytes", "2000", "--max-batches", "2", "--max-batch-size", "2")
    with ServerProcess(tiny_llama, "--data-dir", str(tmp_path), *limits) as server, connect(server) as client:
        first = upload(client, "x" * 1500)
        with pytest.raises(openai.BadRequestError, match="max_stored_bytes") as error:
            upload(client, "x" * 501)
        assert (error.value.code, error.value.param) == ("storage_limit_exceeded", "file")
        upload(client, "x" * 500)
        with pytest.raises(openai.BadRequestError, match="max_stored_bytes"):
            upload(client, "x")
        assert len(list((tmp_path / "files").iterdir())) == 2
        with connect(server, "other") as other:
            upload(other, "x" * 1500)
        client.files.delete(first)
        for _ in range(3):
            last = upload(client, "x")
        with pytest.raises(openai.BadRequestError, match="max_files") as error:
            upload(client, "x")
        assert error.value.code == "too_many_files"
        client.files.delete(last)
        rows = upload(client, "".join(row(id, max_tokens=400) for id in range(5)))
        begun = [create(client, rows) for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="max_batches") as error:
            create(client, rows)
        assert error.value.code == "too_many_batches"
        client.batches.cancel(begun[0].id)
        until_ended(client, begun[0].id)
        client.batches.cancel(create(client, rows).id)


def test_tenants_share_the_server(tiny_llama: Path, tmp_path: Path) -> None:
    """The short batch of one tenant ends beside ten long ones of another."""
    flags = ("--data-dir", str(tmp_path), "--max-batch-size", "8", "--threads", "1")
    with ServerProcess(tiny_llama, *flags) as server, connect(server) as client, connect(server, "other") as other:
        file = upload(client, "".join(row(id, max_tokens=400) for id in range(500)))
        long = [create(client, file).id for _ in range(10)]
        while client.batches.retrieve(long[0]).request_counts.completed == 0:
            time.sleep(0.01)
        short = until_ended(other, begin(other, "".join(row(id) for id in range(20))).id)
        assert (short.status, short.request_counts.completed) == ("completed", 20)
        assert all(client.batches.retrieve(id).status in ("validating", "in_progress") for id in long)
        for id in long:
            client.batches.cancel(id)
        for id in long:
            until_ended(client, id)
