"""What is new: an Atom feed of new evidence and of papers that got code, and the same as an HTML e-mail."""

from __future__ import annotations

import os
import smtplib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from html import escape
from urllib.parse import unquote, urlsplit
from xml.sax.saxutils import escape as xml_escape
from xml.sax.saxutils import quoteattr

from assay import catalogue
from assay.errors import InputError
from assay.evidence.verdict import say
from assay.site.charts import clean
from assay.site.library import ORIGINS, Library

NEWEST = 60
SCHEMES = {"smtp": 25, "smtps": 465}


@dataclass(frozen=True)
class Entry:
    """One piece of news: a claim was measured on a machine."""

    id: str  # of the record
    slug: str
    claim: str
    title: str
    text: str
    at: datetime
    path: str  # on the site: of the claim, or of the record where the catalogue lacks it


def news(library: Library, since: datetime | None = None, limit: int | None = NEWEST) -> list[Entry]:
    """The deciding records of all claims, the newest first; those made after `since` where it is given."""
    found = []
    titles = {paper.slug: paper.title for paper in catalogue.papers()}
    claims = {claim.id for paper in catalogue.papers() for claim in paper.claims}
    for seen in (s for all_of_claim in library.seen.values() for s in all_of_claim):
        record = seen.record
        if since is not None and record.created <= since:
            continue
        title = titles.get(record.slug, record.slug)
        measured = "" if record.measured is None else f" {say(record.measured, record.unit)};"
        machine = str(library.machines.get(record.fingerprint, {}).get("cpu", "unknown processor"))
        where = f"at {record.scale} scale on {machine}, {ORIGINS[seen.origin]}"
        text = f"{record.metric or record.claim}:{measured} {seen.word}, {where}. {seen.summary.reason}"
        path = f"claims/{record.claim}" if record.claim in claims else f"records/{record.id}"
        head = f"{record.claim}: {seen.word} ({title})"
        found.append(Entry(record.id, record.slug, record.claim, head, text, record.created, path))
    found.sort(key=lambda entry: (entry.at, entry.id), reverse=True)
    return found[:limit]


def atom(entries: Sequence[Entry], base: str) -> str:
    """The news as an Atom document (RFC 4287). `base` is the address of the site, without a slash at its end."""
    updated = max((entry.at for entry in entries), default=datetime(2026, 1, 1, tzinfo=UTC))
    parts = [
        '<?xml version="1.0" encoding="utf-8"?>\n<feed xmlns="http://www.w3.org/2005/Atom">',
        "<title>assay: what was measured</title>",
        f"<id>{xml_escape(_printable(base))}/</id>",
        f"<link rel={quoteattr('self')} href={quoteattr(base + '/feed.atom')}/>",
        f"<link href={quoteattr(base + '/')}/>",
        f"<updated>{updated.astimezone(UTC).isoformat()}</updated>",
        "<author><name>assay</name></author>",
    ]
    for entry in entries:
        link = f"{base}/{entry.path}"
        parts.append(
            f"<entry><id>urn:assay:record:{entry.id}</id><title>{xml_escape(_printable(entry.title))}</title>"
            f"<link href={quoteattr(_printable(link))}/><updated>{entry.at.astimezone(UTC).isoformat()}</updated>"
            f"<summary>{xml_escape(_printable(entry.text))}</summary></entry>"
        )
    return "\n".join([*parts, "</feed>\n"])


def _printable(text: str) -> str:
    """Text without the characters that XML cannot hold."""
    return "".join(letter if letter.isprintable() or letter == " " else "\N{REPLACEMENT CHARACTER}" for letter in text)


def digest(entries: Sequence[Entry], base: str, since: datetime) -> str:
    """The news as an HTML page that mail programs show: no style sheet, no picture, no script; links only where `base` is given."""
    rows = []
    for entry in entries:
        name = escape(clean(entry.title))
        linked = f'<a href="{escape(base)}/{escape(entry.path)}">{name}</a>' if base else name
        rows.append(f"<li><p><b>{linked}</b><br>{escape(clean(entry.text))}</p></li>")
    said = f"<ul>{''.join(rows)}</ul>" if rows else "<p>Nothing new was measured.</p>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>assay: what is new</title></head><body>'
        f"<h1>What is new since {since:%Y-%m-%d}</h1>{said}<p>Verdicts are those of {datetime.now(UTC):%Y-%m-%d}.</p></body></html>\n"
    )


def as_mail(html: str, entries: Sequence[Entry], sender: str, to: str) -> EmailMessage:
    """The digest as a message with a plain part beside it. Raises InputError for an address that could carry a header of its own."""
    for name, address in (("the sender's address", sender), ("--to", to)):
        if "@" not in address or any(not letter.isprintable() or letter in ",; " for letter in address):
            raise InputError(f"{name} must be one e-mail address, got {address!r}")
    message = EmailMessage()
    message["From"], message["To"] = sender, to
    message["Subject"] = f"assay: {len(entries)} new {'measurement' if len(entries) == 1 else 'measurements'}"
    message["Date"], message["Message-ID"] = formatdate(localtime=False), make_msgid(domain="assay.invalid")
    message.set_content("\n\n".join(f"{entry.title}\n{entry.text}" for entry in entries) or "Nothing new was measured.")
    message.add_alternative(html, subtype="html")
    return message


def send(message: EmailMessage, url: str | None = None) -> None:
    """Send through `ASSAY_SMTP_URL` (smtp://HOST, with STARTTLS where the server has it; smtps://USER:PASSWORD@HOST).

    A password is only sent over TLS. Raises InputError for a URL of another form and when the server does not take the message.
    """
    url = url or os.environ.get("ASSAY_SMTP_URL", "")
    try:
        parts = urlsplit(url)
        port = parts.port or SCHEMES.get(parts.scheme, 0)
    except ValueError:
        raise InputError("ASSAY_SMTP_URL must be smtp://HOST[:PORT] or smtps://USER:PASSWORD@HOST[:PORT]") from None
    if parts.scheme not in SCHEMES or not parts.hostname:
        raise InputError("ASSAY_SMTP_URL must be smtp://HOST[:PORT] or smtps://USER:PASSWORD@HOST[:PORT]")
    import ssl

    context = ssl.create_default_context()
    try:
        if parts.scheme == "smtps":
            server: smtplib.SMTP = smtplib.SMTP_SSL(parts.hostname, port, timeout=30, context=context)
        else:
            server = smtplib.SMTP(parts.hostname, port, timeout=30)
        with server:
            secure = parts.scheme == "smtps"
            server.ehlo()
            if not secure and server.has_extn("starttls"):
                server.starttls(context=context)
                secure = True
            if parts.username:
                if not secure:
                    raise InputError(f"{parts.hostname} offers no TLS: no password is sent to it")
                server.login(unquote(parts.username), unquote(parts.password or ""))
            server.send_message(message)
    except (OSError, smtplib.SMTPException) as error:
        raise InputError(f"the digest could not be sent through {parts.hostname}:{port}: {error}") from None
