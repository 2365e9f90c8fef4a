"""Downloads from a local server: resumed, verified, nothing of the user's touched."""

from __future__ import annotations

import pytest

from ldm.data.prepare import pages
from ldm.data.prepare.download import fetch
from tests.data.archives import md5

CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def served(server):
    server.files["/a"] = CONTENT


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("present", [0, 100, len(CONTENT)])
def test_a_partial_file_is_completed(server, tmp_path, ranges, present):
    server.ranges = ranges
    (tmp_path / "a.part").write_bytes(CONTENT[:present])
    fetch(f"{server.url}/a", tmp_path / "a", size=len(CONTENT), md5=md5(CONTENT))
    assert (tmp_path / "a").read_bytes() == CONTENT and [path.name for path in tmp_path.iterdir()] == ["a"]
    assert server.requests == [("/a", f"bytes={present}-" if present else None)]


def test_a_broken_connection_goes_on_where_it_stopped(server, tmp_path):
    server.cut = 3000
    assert fetch(f"{server.url}/a", tmp_path / "a", attempts=1).read_bytes() == CONTENT  # each one brings something
    assert [asked for _, asked in server.requests] == [None, *(f"bytes={start}-" for start in (3000, 6000, 9000))]


@pytest.mark.parametrize("ranges", [True, False])
def test_connections_in_vain_end_it_and_a_later_call_goes_on(server, tmp_path, ranges):
    server.cut, server.ranges = 3000, ranges
    if ranges:
        server.cut = 0
        (tmp_path / "a.part").write_bytes(CONTENT[:3000])
    with pytest.raises(ConnectionError, match=r"after 3000 bytes, and 2 attempts brought no more.*run again to resume"):
        fetch(f"{server.url}/a", tmp_path / "a", attempts=2, pause=0)
    assert (tmp_path / "a.part").read_bytes() == CONTENT[:3000] and not (tmp_path / "a").exists()
    assert len(server.requests) == (2 if ranges else 3)
    server.cut = None
    assert fetch(f"{server.url}/a", tmp_path / "a").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(server, tmp_path):
    server.errors = [503, 429, 502]
    assert fetch(f"{server.url}/a", tmp_path / "a", pause=0).read_bytes() == CONTENT
    server.errors, server.requests = [503] * 9, []
    with pytest.raises(ConnectionError, match=r"sent nothing in 5 attempts \(503 Service Unavailable\)"):
        fetch(f"{server.url}/a", tmp_path / "b", pause=0)
    server.errors = [403]
    with pytest.raises(ConnectionError, match="answered 403 Forbidden; give a mirror"):
        fetch(f"{server.url}/a", tmp_path / "b")
    assert len(server.requests) == 6


def test_a_reply_from_another_place_in_the_file_is_not_appended(server, tmp_path):
    (tmp_path / "a.part").write_bytes(CONTENT[:3000])
    server.shift = 100
    with pytest.raises(ConnectionError, match=r"asked for bytes 3000-, got bytes 3100-10239/10240"):
        fetch(f"{server.url}/a", tmp_path / "a", attempts=2, pause=0)
    assert (tmp_path / "a.part").read_bytes() == CONTENT[:3000]


@pytest.mark.parametrize("present", [0, 3000])
def test_a_web_page_is_told_and_costs_nothing_of_what_came(server, tmp_path, present):
    (tmp_path / "a.part").write_bytes(CONTENT[:present])
    server.pages = {
        "/a": "<html><title>Sign in</title><style>p {}</style><p>to the <b>café&#39;s</b> network</p></html>"
    }
    with pytest.raises(
        ValueError, match=r"web page in place of the file: 'Sign in to the café's network'.*put it at .*/a, or"
    ):
        fetch(f"{server.url}/a", tmp_path / "a", md5=md5(CONTENT))
    assert (tmp_path / "a.part").read_bytes() == CONTENT[:present]


@pytest.mark.parametrize("present", [0, 3000])
def test_the_question_before_a_large_download_is_answered(server, tmp_path, present):
    """Google Drive's page: "can't scan this file for viruses", with a form of hidden fields."""
    (tmp_path / "a.part").write_bytes(CONTENT[:present])
    server.pages = {
        "/uc?id=X": "<title>Warning</title><form action='/other'><input type='hidden' name='q' value='1'></form>"
        "<form id='download-form' action='/download' method='get'><input type='submit' value='Download anyway'/>"
        "<input type='hidden' name='id' value='X'><input type='hidden' name='uuid' value='1 &amp; 2'></form>"
    }
    server.files["/download?id=X&uuid=1+%26+2"] = CONTENT
    assert fetch(f"{server.url}/uc?id=X", tmp_path / "a").read_bytes() == CONTENT
    server.pages["/download?id=X&uuid=1+%26+2"] = "<p>Too many users have viewed or downloaded this file</p>"
    with pytest.raises(ValueError, match="'Too many users"):
        fetch(f"{server.url}/uc?id=X", tmp_path / "b")


def test_a_form_that_leads_to_another_host_is_not_followed():
    form = "<form id='download-form' action='{}'><input type='hidden' name='id' value='X'></form>"
    page = "https://drive.example/uc?id=X"
    assert pages.Page(page, form.format("/download?old")).download == "https://drive.example/download?id=X"
    assert pages.Page(page, form.format("https://elsewhere.example/download")).download is None
    assert pages.Page(page, form.format("http://drive.example/download")).download is None
    assert pages.Page(page, form.replace("download-form", "search")).download is None


def test_a_partial_file_longer_than_the_published_one_begins_again(server, tmp_path):
    (tmp_path / "a.part").write_bytes(CONTENT + b"x")
    assert fetch(f"{server.url}/a", tmp_path / "a").read_bytes() == CONTENT


def test_another_content_is_kept_aside_and_another_length_not_fetched(server, tmp_path):
    with pytest.raises(ValueError, match="expected md5"):
        fetch(f"{server.url}/a", tmp_path / "a", md5="0" * 32)
    assert [path.name for path in tmp_path.iterdir()] == ["a.rejected"]
    with pytest.raises(ValueError, match="not the published file: expected 1 bytes, it has 10240"):
        fetch(f"{server.url}/a", tmp_path / "b", size=1)
    with pytest.raises(ConnectionError, match="404"):
        fetch(f"{server.url}/absent", tmp_path / "b")
    with pytest.raises(ValueError, match="http"):
        fetch("file:///etc/hostname", tmp_path / "b")
    with pytest.raises(ConnectionError, match=r"sent nothing in 2 attempts \(.*refused"):
        fetch("http://127.0.0.1:1/a", tmp_path / "b", attempts=2, pause=0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.rejected"]


def test_a_disk_that_takes_no_more_is_told_at_once(server, tmp_path):
    (tmp_path / "a.part").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"a\.part cannot be written \(No space left on device\)"):
        fetch(f"{server.url}/a", tmp_path / "a")
    assert len(server.requests) == 1


def test_a_users_file_is_used_or_left_alone(server, tmp_path):
    mine = tmp_path / "a"
    mine.write_bytes(b"mine")
    with pytest.raises(ValueError, match="move it away"):
        fetch(f"{server.url}/a", mine, md5=md5(CONTENT))
    assert fetch(f"{server.url}/a", mine, md5=md5(b"mine")) == mine
    assert mine.read_bytes() == b"mine" and not server.requests
