"""Web pages sent in place of a file: what they say, and Google Drive's question before a large download."""

from __future__ import annotations

from html.parser import HTMLParser
from urllib.parse import urlencode, urljoin, urlsplit

DOWNLOAD_FORM = "download-form"  # its id on Google Drive's page "can't scan this file for viruses"
UNSEEN = ("script", "style")


class Page(HTMLParser):
    """A page's words, and the address of its download form where it has one.

    Args:
        address: the page's own.
        html: its text.
    """

    def __init__(self, address: str, html: str):
        super().__init__()
        self._address = address
        self._action: str | None = None
        self._fields: dict[str, str] = {}
        self._inside = False  # of the download form
        self._unseen = False  # a script or a style
        self._words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a download form and its fields."""
        given = dict(attrs)
        self._unseen = self._unseen or tag in UNSEEN
        if tag == "form":
            self._inside = given.get("id") == DOWNLOAD_FORM
            if self._inside:
                self._action = urljoin(self._address, given.get("action") or "")
        if tag == "input" and self._inside and given.get("type") == "hidden" and given.get("name"):
            self._fields[given["name"]] = given.get("value") or ""

    def handle_endtag(self, tag: str) -> None:
        """Leave a form, a script or a style."""
        self._inside = self._inside and tag != "form"
        self._unseen = self._unseen and tag not in UNSEEN

    def handle_data(self, data: str) -> None:
        """Keep the words that a reader sees."""
        if not self._unseen:
            self._words += data.split()

    @property
    def words(self) -> str:
        """The beginning of what it says."""
        text = " ".join(self._words)
        return text if len(text) <= 200 else f"{text[:200]}..."

    @property
    def download(self) -> str | None:
        """Where its download form leads, if that is the page's own host."""
        if self._action is None or urlsplit(self._action)[:2] != urlsplit(self._address)[:2]:
            return None
        return f"{self._action.partition('?')[0]}?{urlencode(self._fields)}"


def drive_url(identity: str) -> str:
    """Where Google Drive hands out a shared file, without its page for large ones."""
    return f"https://drive.usercontent.google.com/download?id={identity}&export=download&confirm=t"
