"""Tiers below the pool: the disk tier on real folders, killed, full, removed and shared; the host tier beside it."""

import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from octavo.errors import ConfigError
from octavo.formats.page_file import page_file_bytes
from octavo.kv.tiers.disk import DiskTier
from octavo.kv.tiers.host import HostTier

PAGE_BYTES = 1000
FILE_BYTES = page_file_bytes(PAGE_BYTES)
KEYS = [bytes([k, 7]) * 8 for k in range(8)]


def page_of(key: bytes, size: int = PAGE_BYTES) -> np.ndarray:
    """Random bytes, for each key its own."""
    return np.random.default_rng(list(key)).integers(0, 256, size, np.uint8)


def open_tier(folder: Path, pages: int = 100, **settings: float) -> DiskTier:
    return DiskTier(folder, pages * FILE_BYTES, PAGE_BYTES, **settings)


def fill(tier: DiskTier, keys: list[bytes]) -> None:
    for key in keys:
        assert tier.write(key, page_of(key))


def holds(tier: DiskTier | HostTier, key: bytes) -> bool:
    """Whether the tier gives the page; never a wrong one."""
    content = tier.read(key)
    assert content is None or np.array_equal(content, page_of(key))
    assert (key in tier) == (content is not None)
    return content is not None


def page_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.page"))


class TierAgainstModel(RuleBasedStateMachine):
    """A tier of four pages against a dict of four; the disk tier also over restarts."""

    tier: DiskTier | HostTier
    folder: Path

    @initialize(host=st.booleans())
    def begin(self, host: bool) -> None:
        self.model: OrderedDict[bytes, None] = OrderedDict()
        self.folder = Path(tempfile.mkdtemp())
        self.tier = HostTier(4 * PAGE_BYTES) if host else open_tier(self.folder, 4)

    @rule(key=st.sampled_from(KEYS))
    def write(self, key: bytes) -> None:
        assert self.tier.write(key, page_of(key))
        self.model[key] = None
        self.model.move_to_end(key)
        while len(self.model) > 4:
            self.model.popitem(last=False)

    @rule(key=st.sampled_from(KEYS))
    def read(self, key: bytes) -> None:
        assert holds(self.tier, key) == (key in self.model)
        if key in self.model:
            self.model.move_to_end(key)

    @rule()
    def restart(self) -> None:
        if isinstance(self.tier, DiskTier):
            self.tier.close()
            self.tier = open_tier(self.folder, 4)

    @rule(key=st.sampled_from(KEYS))
    def damage(self, key: bytes) -> None:
        path = self.folder / key.hex()[:2] / f"{key.hex()}.page"
        if isinstance(self.tier, DiskTier) and key in self.model:
            path.write_bytes(path.read_bytes()[::-1])
            assert not holds(self.tier, key)
            assert not path.exists()
            del self.model[key]

    @invariant()
    def it_has_what_the_model_has(self) -> None:
        assert [key in self.tier for key in KEYS] == [key in self.model for key in KEYS]
        if isinstance(self.tier, DiskTier):
            assert [path.stem for path in page_files(self.folder)] == sorted(key.hex() for key in self.model)

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


TestTierAgainstModel = TierAgainstModel.TestCase
TestTierAgainstModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_smaller_capacity_deletes_the_least_recently_used(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    fill(tier, KEYS[:5])
    assert holds(tier, KEYS[0])
    tier = open_tier(tmp_path, 2)
    assert [key in tier for key in KEYS[:5]] == [True, False, False, False, True]
    assert len(page_files(tmp_path)) == 2


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    """Nor is a young temporary file removed: another server may be writing it."""
    name = KEYS[0].hex()
    part = tmp_path / name[:2]
    foreign = ["notes.txt", f"{name[:2]}/notes.txt", f"{name[:2]}/x.tmp", "data/x.tmp", f"{name[:2]}/{name}.page.tmp"]
    foreign += [f"{name[:2]}/{KEYS[1].hex()}.page", f"{name}.page"]  # ours by name, in a place where we put none
    for file in foreign:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("mine")
    old, young = (part / f"{name}.page.{digit * 16}.tmp" for digit in "ab")
    for file in (old, young):
        file.write_text("half of a pa")
    os.utime(old, (0, 0))
    tier = open_tier(tmp_path, 1)
    assert not any(holds(tier, key) for key in KEYS)
    assert (old.exists(), young.exists()) == (False, True)
    fill(tier, KEYS[:3])
    assert all((tmp_path / file).read_text() == "mine" for file in foreign)


def test_pages_of_another_size_are_never_served_and_give_way(tmp_path: Path) -> None:
    other = DiskTier(tmp_path, 10**6, PAGE_BYTES // 2)
    for key in KEYS[:3]:
        assert other.write(key, page_of(key, PAGE_BYTES // 2))
    tier = open_tier(tmp_path, 2)
    assert not holds(tier, KEYS[0])
    fill(tier, KEYS[3:5])
    assert [holds(tier, key) for key in KEYS[3:5]] == [True, True]
    assert sum(file.stat().st_size for file in page_files(tmp_path)) <= 2 * FILE_BYTES


def test_two_servers_share_a_folder(tmp_path: Path) -> None:
    one, two = open_tier(tmp_path, 4), open_tier(tmp_path, 4)
    fill(one, KEYS[:4])
    fill(two, KEYS[:4])
    fill(two, KEYS[4:8])  # deletes what `one` has
    assert not holds(one, KEYS[0])
    assert one.write(KEYS[1], page_of(KEYS[1])), "it is written anew, not believed to be there"
    assert holds(one, KEYS[1])
    failures: list[BaseException] = []

    def work(tier: DiskTier, seed: int) -> None:
        try:
            for key in np.random.default_rng(seed).choice(len(KEYS), 200):
                assert tier.write(KEYS[key], page_of(KEYS[key]))
                content = tier.read(KEYS[key])
                assert content is None or np.array_equal(content, page_of(KEYS[key]))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=turn) for turn in ((one, 1), (one, 1), (two, 1), (two, 2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not list(tmp_path.rglob("*.tmp"))
    for tier in (one, two):
        fill(tier, KEYS[:4])
        assert all(holds(tier, key) for key in KEYS[:4]), "its room is not what it was"


WRITER = """
import sys
from pathlib import Path
from test_disk_tier import PAGE_BYTES, page_of
from octavo.kv.tiers.disk import DiskTier
tier = DiskTier(Path(sys.argv[1]), 10**9, 100 * PAGE_BYTES)
print("begin", flush=True)
for number in range(10**6):
    key = number.to_bytes(16, "little")
    tier.write(key, page_of(key, 100 * PAGE_BYTES))
    print(number, flush=True)
"""


def test_killed_at_any_instant(tmp_path: Path) -> None:
    """Every page that was reported as written is there, every page that is there is right, and half ones go."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["src", *sys.path])}
    for pages in (1, 20, 100):
        folder = tmp_path / str(pages)
        command = [sys.executable, "-c", WRITER, str(folder)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "begin\n"
            for _ in range(pages):
                assert writer.stdout.readline()
            writer.kill()
            written = pages + writer.stdout.read().count("\n")
        for half in folder.rglob("*.tmp"):
            os.utime(half, (0, 0))
        tier = DiskTier(folder, 10**9, 100 * PAGE_BYTES)
        names = [bytes.fromhex(path.stem) for path in page_files(folder)]
        assert {number.to_bytes(16, "little") for number in range(written)} <= set(names)
        for key in names:
            content = tier.read(key)
            assert content is not None and np.array_equal(content, page_of(key, 100 * PAGE_BYTES))
        assert not list(folder.rglob("*.tmp"))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A limit on the size of files stands in for the disk's end; the system refuses the write in the same place."""
    tier = open_tier(tmp_path, 4, retry_seconds=0.5)
    fill(tier, KEYS[:2])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES // 2, limits[1]))
        assert not any(tier.write(key, page_of(key)) for key in KEYS[2:6])
        time.sleep(0.5)
        assert not any(tier.write(key, page_of(key)) for key in KEYS[2:6])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (warning,) = warnings(caplog)
    assert "File too large" in warning and "\n" not in warning
    assert [holds(tier, key) for key in KEYS[:4]] == [True, True, False, False]
    assert not list(tmp_path.rglob("*.tmp"))
    assert not tier.write(KEYS[2], page_of(KEYS[2])), "not every page tries anew"
    time.sleep(0.5)
    fill(tier, KEYS[2:4])
    assert all(holds(tier, key) for key in KEYS[:4])


def test_a_disk_without_space(tmp_path: Path) -> None:
    """On a file system of 64 KiB, where the tests may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs to mount a file system")
    try:
        tier = DiskTier(disk, 10**6, 20_000, retry_seconds=0)
        written = [tier.write(key, page_of(key, 20_000)) for key in KEYS]
        assert any(written) and not all(written)
        for key, there in zip(KEYS, written, strict=True):
            content = tier.read(key)
            assert (content is not None) == there
            assert content is None or np.array_equal(content, page_of(key, 20_000))
        assert not list(disk.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_is_removed_and_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "pages"
    tier = open_tier(folder, retry_seconds=0)
    fill(tier, KEYS[:3])
    shutil.rmtree(folder)
    assert not any(holds(tier, key) for key in KEYS)
    assert not any(tier.write(key, page_of(key)) for key in KEYS)
    assert not folder.exists(), "it may have been a mounted disk, and what is below the mount point is another"
    assert len(warnings(caplog)) == 1
    folder.mkdir()
    fill(tier, KEYS)
    assert all(holds(tier, key) for key in KEYS)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/octavo")):
        with pytest.raises(ConfigError, match="give a folder that you can write to") as error:
            open_tier(folder)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="kv_disk_size must be at least"):
        DiskTier(tmp_path, FILE_BYTES - 1, PAGE_BYTES)


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
@pytest.mark.parametrize("inner", [False, True])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path, mode: int, inner: bool) -> None:
    fill(open_tier(tmp_path), KEYS[:1])
    folder = tmp_path / KEYS[0].hex()[:2] if inner else tmp_path
    folder.chmod(mode)
    with pytest.raises(ConfigError, match=r"other users can write to .* of your own") as error:
        open_tier(tmp_path)
    assert "\n" not in str(error.value)
    folder.chmod(0o755)
    assert holds(open_tier(tmp_path), KEYS[0])


def test_pages_that_others_can_write_to_are_not_used(tmp_path: Path) -> None:
    fill(open_tier(tmp_path), KEYS[:3])
    page_files(tmp_path)[0].chmod(0o666)
    tier = open_tier(tmp_path)
    assert [holds(tier, key) for key in KEYS[:3]] == [False, True, True]
    fill(tier, KEYS[:1])
    assert holds(open_tier(tmp_path), KEYS[0])


def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs to give a folder to another user")
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(ConfigError, match="other users can write to"):
        open_tier(tmp_path)


def test_a_host_tier_has_room_for_a_page_or_says_no() -> None:
    assert not HostTier(PAGE_BYTES - 1).write(KEYS[0], page_of(KEYS[0]))
    tier, content = HostTier(PAGE_BYTES), page_of(KEYS[0])
    assert tier.write(KEYS[0], content)
    content[:] = 0  # the pool's page goes on to another content
    assert holds(tier, KEYS[0])
