"""`assay loadtest URL [URL2]`: what OpenAI-compatible servers do under load."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

REQUESTS = 64  # to each server at least, and so many times the concurrency:
ROUNDS = 4
NOT_MET = 1  # exit code


def loadtest(
    url: Annotated[str, typer.Argument(help="The server, as http://HOST:PORT, with the API's path if it is not /v1.")],
    url2: Annotated[
        str | None, typer.Argument(help="A second one, loaded in turn with the first and compared with it in pairs.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Closed loop: so many clients, each of which waits for its answer.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Open loop: so many requests a second, at random times, whatever is answered.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help='Requests to send: JSON lines of {"at": seconds, "prompt": ... or "prompt_tokens": n, "new_tokens": n}. With '
            "neither --concurrency nor --rate they are sent at their times."
        ),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help="Requests to each server; 64, or more where many run at a time, or the trace's.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Start no request after so long (each server).")] = None,
    slo: Annotated[
        str | None, typer.Option(help="Limits in ms for goodput: ttft=500,itl=50 and, of the whole answer, e2e=9000.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model to ask for; the first that the server lists.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Key to send; better in ASSAY_API_KEY, which other users of the machine do not see."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat/--completions", help="Which of the two APIs to ask.")] = True,
    prompt_tokens: Annotated[str, typer.Option(help="Tokens of the prompts, about: n, or n..m at random.")] = "64..512",
    new_tokens: Annotated[str, typer.Option(help="Tokens of the answers at most: n, or n..m at random.")] = "128..256",
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Ask for answers of full length, where the server knows this.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds a request may take.")] = 300.0,
    blocks: Annotated[int, typer.Option(help="Of two servers: pairs of blocks in which they take turns.")] = 8,
    seed: Annotated[
        int | None, typer.Option(help="Of prompts, lengths and times. Left out, prompts are new to every server.")
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="Write what became of each request, as JSON lines that assay simulate reads (one server)."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Exit with 1 unless 95 % of each server's requests are within the SLO (without one: all are answered).",
        ),
    ] = False,
) -> None:
    """Put load on one server, or on two in turn, and say what their users get."""
    import asyncio

    from assay.cli.output import print_json
    from assay.cli.serve import checked_keys
    from assay.errors import InputError
    from assay.loadtest import generator, report
    from assay.loadtest.client import server_at
    from assay.loadtest.traces import lengths_of, read_trace
    from assay.paths import atomic_file

    for name, value in (("--concurrency", concurrency), ("--requests", requests), ("--blocks", blocks)):
        _checked(name, value, low=1, high=1 << 20)
    for name, number in (("--rate", rate), ("--seconds", seconds), ("--timeout", timeout)):
        _checked(name, number, above=0, high=1e6)
    _checked("--seed", seed, low=0, high=1 << 62)
    if samples is not None and url2 is not None:
        raise InputError("--samples is for one server: two take turns, and neither answers the whole trace")
    limits = None if slo is None else report.slo_of(slo)
    lines = () if trace is None else tuple(read_trace(trace))
    keys = checked_keys(None if api_key is None else [api_key], None)
    options: dict[str, Any] = {
        "model": model or "",
        "chat": chat,
        "api_key": keys[0] if keys else None,
        "timeout": timeout,
    }
    options |= {"extra": {"ignore_eos": True}} if ignore_eos else {}
    servers = [server_at(one, **options) for one in (url, url2) if one is not None]
    parts = blocks if len(servers) == 2 else 1
    if requests is None and seconds is None and not lines:
        requests = max(REQUESTS, ROUNDS * (concurrency or 1), parts * 2 * (concurrency or 1))
    load = generator.Load(
        concurrency=concurrency,
        rate=rate,
        replay=bool(lines) and concurrency is None and rate is None,
        requests=requests,
        seconds=seconds,
        prompt_tokens=lengths_of(prompt_tokens, "--prompt-tokens"),
        new_tokens=lengths_of(new_tokens, "--new-tokens"),
        trace=lines,
        blocks=parts,
        seed=int.from_bytes(os.urandom(4)) if seed is None else seed,
    )
    tested = asyncio.run(generator.measure(servers, load, say=_say))
    if samples is not None:
        with atomic_file(samples) as temporary:
            temporary.write_text(report.samples_text(tested[0]), encoding="utf-8")
    found = report.document(tested, load, limits)
    if json:
        print_json(found)
    else:
        print_result(found)
    if check and not report.met(found):
        raise typer.Exit(NOT_MET)


def _checked(name: str, value: Any, **allowed: Any) -> None:
    """Raise InputError unless an option's number, if given, is in its range."""
    from assay import checks
    from assay.errors import InputError

    if value is None:
        return
    try:
        checks.number(name, value, **allowed)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None


def _say(text: str) -> None:
    """One line at a time: a line that keeps moving would take processor time from what is measured."""
    print(f"assay: {text}", file=sys.stderr, flush=True)


TITLES = {
    "ttft": "first token, ms",
    "itl": "between tokens, ms",
    "gap": "longest pause, ms",
    "e2e": "whole answer, ms",
}
RATES = {
    "tokens_per_second": "tokens/s",
    "requests_per_second": "requests/s",
    "goodput_per_second": "goodput, requests/s",
}


def print_result(found: dict[str, Any]) -> None:
    """Tables of each server, then the comparison, then what to beware of."""
    from rich.console import Console

    out = Console(highlight=False)
    for server in found["servers"]:
        _print_server(out, server, found)
    if found["comparison"] is not None:
        _print_comparison(out, found)
    share = found["generator"]["core_share"]
    _print(
        out,
        f"The load generator used {100 * share:.1f} % of a core. Intervals are for 95 %. Seed {found['load']['seed']}.",
    )
    for warning in found["warnings"]:
        _print(out, f"Note: {warning}.")


def _print_server(out: Any, server: dict[str, Any], found: dict[str, Any]) -> None:
    from rich.table import Table

    load = found["load"]
    loop = {
        "closed": f"{load['concurrency']} at a time",
        "open": "at the trace's times" if load["rate"] is None else f"{load['rate']:g} a second",
    }[load["loop"]]
    _print(out, f"{server['url']}  {server['model']}  {server['api']}, {loop}")
    _print(
        out,
        f"{server['answered']} of {server['requests']} requests answered in {server['seconds']:.1f} s, {server['in_flight']:.1f} in "
        f"flight on average",
    )
    for kind, count in server["errors"].items():
        _print(out, f"  {count} x {kind}: {server['messages'][kind]}")
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for side in ("left", "left", "right", "left"):
        table.add_column(justify=side, no_wrap=True)
    for name, title in TITLES.items():
        for percentile, shown in (server[name] or {"p50": None}).items():
            table.add_row(title if percentile == "p50" else "", percentile, *_interval(shown))
    for name, title in RATES.items():
        if name in server:
            table.add_row(title, "", *_interval(server[name]))
    if server["within_slo"] is not None:
        share = {bound: None if value is None else 100 * value for bound, value in server["within_slo"].items()}
        table.add_row("within the SLO, %", "", *_interval(share))
    out.print(table)


def _print_comparison(out: Any, found: dict[str, Any]) -> None:
    compared = dict(found["comparison"])
    _print(out, f"Second server over the first, median of {compared.pop('pairs')} pairs of blocks:")
    titles = {
        "ttft": "first token, p50",
        "ttft_p95": "first token, p95",
        "itl": "between tokens, p50",
        "e2e": "whole answer, p50",
    }
    for name, ratio in compared.items():
        told = "not in every block" if ratio is None else " ".join(_interval(ratio))
        _print(out, f"  {(titles | RATES)[name]:22} {told}")


def _interval(shown: dict[str, float | None] | None) -> tuple[str, str]:
    """A figure and its interval; "?" for a bound that there is none of."""
    if shown is None:
        return "-", ""
    value, low, high = (_number(shown[bound]) for bound in ("value", "low", "high"))
    return value, f"{low} to {high}"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _print(out: Any, text: str) -> None:
    from assay.cli.output import wrapped

    out.print(wrapped(text), highlight=False, markup=False, soft_wrap=True)
