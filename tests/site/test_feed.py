"""News: the newest first, whole Atom documents whatever records hold, and mail that carries nothing of others' making."""

from __future__ import annotations

import json
import smtplib
from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree

import pytest
from tests.evidence.evidence_maker import START, make
from tests.site.conftest import CLAIM, HERE

from assay.cli.digest import beginning
from assay.cli.main import main
from assay.errors import InputError
from assay.site import feed

NAMES = {"a": "http://www.w3.org/2005/Atom"}


def test_the_newest_first_and_only_what_is_new(shelf):
    entries = feed.news(shelf.library())
    assert len(entries) == 5
    assert [e.at for e in entries] == sorted((e.at for e in entries), reverse=True)
    assert entries[0].claim == CLAIM
    later = feed.news(shelf.library(), START + timedelta(seconds=30))
    assert [e.at for e in later] == [START + timedelta(minutes=2), START + timedelta(minutes=1)]
    assert len(feed.news(shelf.library(), limit=2)) == 2


def test_a_feed_is_well_formed_whatever_records_hold(shelf, store):
    store.add(
        [make(claim="svg2/hunyuan-speedup", fingerprint="x", machine={"cpu": "a <b> & \x00\x1b[31m\u202e"}, minutes=5)]
    )
    text = feed.atom(feed.news(shelf.library()), 'http://h:1/r?a="&<')
    root = ElementTree.fromstring(text)
    entries = root.findall("a:entry", NAMES)
    assert len(entries) == 6
    ids = [entry.find("a:id", NAMES).text for entry in entries]
    assert len(set(ids)) == 6
    for entry in (root, *entries):
        for name in ("id", "title", "updated"):
            assert entry.find(f"a:{name}", NAMES).text
        assert datetime.fromisoformat(entry.find("a:updated", NAMES).text).tzinfo
    assert root.find("a:updated", NAMES).text == entries[0].find("a:updated", NAMES).text
    assert "\x1b" not in text


def test_the_address_of_the_feed(client):
    answer = client.get("/feed.atom")
    assert answer.headers["content-type"].startswith("application/atom+xml")
    links = [
        link.get("href") for link in ElementTree.fromstring(answer.content).iter("{http://www.w3.org/2005/Atom}link")
    ]
    assert links[0] == "http://127.0.0.1/feed.atom"
    page = client.get("/").text
    assert 'type="application/atom+xml"' in page
    for link in links[2:]:
        assert client.get(link.removeprefix("http://127.0.0.1"), follow_redirects=True).status_code == 200


def test_a_digest_escapes_and_links_only_where_it_may(shelf):
    entries = feed.news(shelf.library())
    html = feed.digest(entries, "", START)
    assert "<script>" not in html
    assert "<a " not in html
    assert feed.digest(entries, "https://x.org", START).count("https://x.org/claims/") == 5
    assert "Nothing new" in feed.digest([], "", START)


@pytest.mark.parametrize("address", ["nobody", "a@b\nBcc: c@d", "a@b,c@d", "a@b c@d", ""])
def test_addresses_that_are_more_than_one(address):
    with pytest.raises(InputError, match="one e-mail address"):
        feed.as_mail("<p>", [], "me@here", address)


class Fake:
    """An SMTP server that notes what it is told."""

    def __init__(self, tls=True):
        self.tls, self.log = tls, []

    def __call__(self, host, port, **_):
        self.log.append((host, port))
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ehlo(self):
        return 250, b""

    def has_extn(self, name):
        return self.tls

    def starttls(self, context):
        self.log.append("tls")

    def login(self, user, password):
        self.log.append((user, password))

    def send_message(self, message):
        self.log.append(message["To"])


def test_mail_goes_by_the_url(monkeypatch):
    message = feed.as_mail("<p>", [], "me@here", "you@there")
    fake = Fake()
    monkeypatch.setattr(smtplib, "SMTP", fake)
    feed.send(message, "smtp://u%40x:p%20w@mail.example:2525")
    assert fake.log == [("mail.example", 2525), "tls", ("u@x", "p w"), "you@there"]
    secure = Fake()
    monkeypatch.setattr(smtplib, "SMTP_SSL", secure)
    feed.send(message, "smtps://mail.example")
    assert secure.log == [("mail.example", 465), "you@there"]


def test_no_password_goes_out_in_the_clear(monkeypatch):
    fake = Fake(tls=False)
    monkeypatch.setattr(smtplib, "SMTP", fake)
    message = feed.as_mail("<p>", [], "me@here", "you@there")
    with pytest.raises(InputError, match="no TLS"):
        feed.send(message, "smtp://u:p@mail.example")
    assert fake.log == [("mail.example", 25)]
    feed.send(message, "smtp://mail.example")
    assert fake.log[-1] == "you@there"


@pytest.mark.parametrize("url", ["", "http://x", "smtp://", "smtp://x:99999", "mail.example"])
def test_urls_that_name_no_server(url, monkeypatch):
    monkeypatch.delenv("ASSAY_SMTP_URL", raising=False)
    with pytest.raises(InputError, match="ASSAY_SMTP_URL must be"):
        feed.send(feed.as_mail("<p>", [], "me@here", "you@there"), url)


def test_a_server_that_refuses_is_named(monkeypatch):
    def refuses(*_, **__):
        raise smtplib.SMTPConnectError(421, b"busy")

    monkeypatch.setattr(smtplib, "SMTP", refuses)
    with pytest.raises(InputError, match="could not be sent through mail.example:25"):
        feed.send(feed.as_mail("<p>", [], "me@here", "you@there"), "smtp://mail.example")


def test_the_command(store, tmp_path, monkeypatch, capsys):
    recent = make(claim=CLAIM, fingerprint="mine", machine=HERE, created=datetime.now(UTC) - timedelta(days=2))
    old = make(
        claim="svg2/wan-speedup", fingerprint="mine", machine=HERE, created=datetime.now(UTC) - timedelta(days=20)
    )
    store.add([recent, old])
    monkeypatch.setenv("ASSAY_DATABASE_URL", str(store._url))
    file = tmp_path / "news.html"
    assert main(["digest", "-o", str(file), "--json"]) == 0
    assert [entry["record"] for entry in json.loads(capsys.readouterr().out)] == [recent.id]
    assert CLAIM in file.read_text()
    assert main(["digest", "--since", "4w"]) == 0
    said = capsys.readouterr()
    assert "svg2/wan-speedup" in said.out
    assert "2 new since" in said.err
    for bad in (["--since", "soon"], ["--site", "javascript:x"], ["--to", "nobody"], ["-o", str(tmp_path)]):
        assert main(["digest", *bad]) == 2


def test_spans_and_dates():
    assert timedelta(days=13.9) < datetime.now(UTC) - beginning("2w") < timedelta(days=14.1)
    assert beginning("2026-11-01T10:00:00+02:00").utcoffset() == timedelta(hours=2)
