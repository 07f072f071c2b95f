"""The chain of an audit log: any change shows; a kill of the server is told from a change."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import ConfigError
from octavo.outputs import CompletionOutput
from octavo.server.audit import AuditLog
from octavo.server.audit.chain import ORIGIN, Keys, Verdict, sealed, verify
from octavo.server.edge.access_log import RequestRecord

KEY = "0a" * 32
KEYS = Keys.of(KEY)


def chain(count: int, previous: str = ORIGIN) -> list[bytes]:
    lines = []
    for number in range(count):
        line, previous = sealed({"event": "request", "path": f'/v1/"{number}"\n'}, previous, KEYS)
        lines.append(line)
    return lines


LINES = chain(8)


def check(*files: bytes, folder: Path) -> Verdict:
    paths = [folder / str(number) for number in range(len(files))]
    for path, content in zip(paths, files, strict=True):
        path.write_bytes(content)
    return verify(paths, KEYS)


def log_lines(path: Path, count: int, stop: bool = True) -> AuditLog:
    log = AuditLog(path, KEY)
    for number in range(count):
        record = RequestRecord(f"r{number}", "POST", "/v1/completions", "127.0.0.1")
        log.begin(record)
        log.end(record)
    if stop:
        log.close()
    return log


def test_a_whole_log_in_one_file_or_several(tmp_path: Path) -> None:
    verdict = check(b"".join(LINES), folder=tmp_path)
    assert (verdict.lines, verdict.problems, verdict.first) == (8, [], ORIGIN)
    verdict = check(b"".join(LINES[:3]), b"".join(LINES[3:]), folder=tmp_path)
    assert (verdict.lines, verdict.problems) == (8, [])
    verdict = check(b"".join(LINES[3:]), folder=tmp_path)
    assert verdict.problems == [] and verdict.first == json.loads(LINES[2])["mac"]
    assert check(b"", folder=tmp_path).lines == 0


@given(st.data())
def test_any_change_shows(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    lines, place = list(LINES), data.draw(st.integers(0, 6))
    match data.draw(st.sampled_from(["change", "remove", "swap", "repeat", "cut", "foreign"])):
        case "change":
            position = data.draw(st.integers(0, len(lines[place]) - 2))
            lines[place] = lines[place][:position] + b"#" + lines[place][position + 1 :]
        case "remove":
            del lines[place + (place == 0)]  # what is before the first line is another matter
        case "swap":
            lines[place], lines[place + 1] = lines[place + 1], lines[place]
        case "repeat":
            lines.insert(place, lines[place])
        case "cut":
            lines[place] = lines[place][: data.draw(st.integers(0, len(lines[place]) - 2))] + b"\n"
        case "foreign":
            lines[place] = sealed({"event": "request"}, json.loads(lines[place])["previous"], Keys.of("0b" * 32))[0]
    assert check(b"".join(lines), folder=tmp_path_factory.mktemp("log")).problems


def test_a_flood_of_wrong_keys_is_counted(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log", KEY)
    for number in range(1000):
        record = RequestRecord(f"r{number}", "POST", "/v1/completions", "127.0.0.1", status=401, complete=True)
        log.begin(record)
        log.end(record)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    own = sum(line["event"] == "request" for line in lines)
    assert own + sum(line["count"] for line in lines if line["event"] == "refused") == 1000
    assert 100 <= own <= 300 and verify([tmp_path / "log"], KEYS).problems == []


def test_a_log_goes_on_after_a_restart(tmp_path: Path) -> None:
    for _ in range(2):
        log_lines(tmp_path / "log", 5)
    verdict = verify([tmp_path / "log"], KEYS)
    assert (verdict.lines, verdict.problems, verdict.torn, verdict.is_closed) == (14, [], 0, True)
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_a_log_goes_on_after_a_line_of_any_length(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log", KEY)
    record = RequestRecord("r", "POST", "/v1/completions", "127.0.0.1")
    log.begin(record)
    assert record.evidence is not None
    for index in range(20_000):  # as --max-completions may allow
        record.evidence.add_answer(0, CompletionOutput(index, "a", [], finish_reason="stop"))
    log.end(record)
    log.close()
    content = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(content[: content.rindex(b"\n", 0, -1) + 1])  # without the line of the end
    log_lines(tmp_path / "log", 1)
    verdict = verify([tmp_path / "log"], KEYS)
    assert len(content) > 1 << 20 and (verdict.lines, verdict.problems) == (5, [])


@pytest.mark.parametrize("left", [1, 30, 100, -1])
def test_a_line_torn_by_a_kill_is_no_tampering(tmp_path: Path, left: int) -> None:
    log_lines(tmp_path / "log", 3)
    content = (tmp_path / "log").read_bytes()
    start = content.rindex(b"\n", 0, len(content) - 1) + 1
    (tmp_path / "log").write_bytes(content[: start + left] if left > 0 else content[:-1])
    verdict = verify([tmp_path / "log"], KEYS)
    assert verdict.problems == [] and verdict.torn == (1 if left > 0 else 0)
    log_lines(tmp_path / "log", 2)
    verdict = verify([tmp_path / "log"], KEYS)
    assert verdict.problems == [] and verdict.lines == (8 if left > 0 else 9)
    assert verdict.torn == (1 if left > 0 else 0), "of the last one, only the line break was missing"
    lines = (tmp_path / "log").read_bytes().splitlines(keepends=True)
    if left > 0:  # what a server says of a torn line is authentic
        torn = next(line for line in lines if not line.endswith(b"}\n"))
        (tmp_path / "log").write_bytes(b"".join(lines).replace(torn, torn[:-1] + b"0\n"))
        assert verify([tmp_path / "log"], KEYS).problems
        (tmp_path / "log").write_bytes(b"".join(line for line in lines if line != torn))
        assert verify([tmp_path / "log"], KEYS).problems


def test_a_renamed_file_is_followed_by_a_new_one(tmp_path: Path) -> None:
    log = log_lines(tmp_path / "log", 3, stop=False)
    while (tmp_path / "log").read_bytes().count(b"\n") < 4:
        log._wake.set()
    (tmp_path / "log").rename(tmp_path / "log.1")
    record = RequestRecord("r", "POST", "/v1/completions", "127.0.0.1")
    log.begin(record)
    log.end(record)
    log.close()
    verdict = verify([tmp_path / "log.1", tmp_path / "log"], KEYS)
    assert (verdict.lines, verdict.problems, verdict.is_closed) == (6, [], True)
    assert verify([tmp_path / "log"], KEYS).first != ORIGIN
    assert verify([tmp_path / "log", tmp_path / "log.1"], KEYS).problems


def test_what_cannot_be_continued_is_refused(tmp_path: Path) -> None:
    log = log_lines(tmp_path / "log", 1, stop=False)
    with pytest.raises(ConfigError, match="another server writes it"):
        AuditLog(tmp_path / "log", KEY)
    log.close()
    with pytest.raises(ConfigError, match="another key"):
        AuditLog(tmp_path / "log", "0b" * 32)
    for path in (tmp_path, tmp_path / "none" / "log", Path("/dev/full")):
        with pytest.raises(ConfigError, match="cannot write"):
            AuditLog(path, KEY)
