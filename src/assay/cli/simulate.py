"""`assay simulate`: how a fleet of servers would answer a trace, and how well earlier predictions did."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer


def simulate(
    trace: Annotated[
        Path,
        typer.Option(
            help="Requests: Azure's or BurstGPT's CSV, or JSON lines of at, prompt_tokens, new_tokens (with ttft and e2e where they were "
            "measured: assay loadtest --samples)."
        ),
    ],
    fleet: Annotated[
        Path | None, typer.Option(help="The servers, as TOML (docs/simulate.md); --calibrate writes one.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Find the times of the one server that answered the trace.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="With --calibrate: the fleet file to write.")
    ] = None,
    clients: Annotated[
        int | None, typer.Option(help="Closed loop: so many clients, each waits for its answer before it asks again.")
    ] = None,
    faster: Annotated[
        float, typer.Option(help="Let the requests come so many times as fast (2: twice the load).")
    ] = 1.0,
    slo: Annotated[str | None, typer.Option(help="Limits in ms for goodput: ttft=500,itl=50,e2e=9000.")] = None,
    limit: Annotated[int | None, typer.Option(help="The first so many requests of the trace.")] = None,
    max_running: Annotated[int, typer.Option(help="With --calibrate: rows that the server ran at once.")] = 64,
    chunk: Annotated[int, typer.Option(help="With --calibrate: tokens of its pieces of prompts.")] = 256,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say what users would wait, were a trace sent to a fleet; predicted beside measured where the trace has both."""
    from dataclasses import replace

    from assay import checks
    from assay.cli.output import print_json, saying
    from assay.errors import InputError
    from assay.loadtest.report import slo_of
    from assay.methods.core.fleet import simulator
    from assay.methods.core.fleet.files import Fleet, fleet_text, read_fleet
    from assay.methods.core.fleet.traces import read_trace
    from assay.paths import atomic_file

    try:
        checks.number("--faster", faster, above=0, high=1e6)
        for name, value in (
            ("--clients", clients),
            ("--limit", limit),
            ("--max-running", max_running),
            ("--chunk", chunk),
        ):
            if value is not None:
                checks.whole(name, value, low=1)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None
    if (fleet is None) == (not calibrate):
        raise InputError("give either --fleet FILE or --calibrate")
    if output is not None and not calibrate:
        raise InputError("-o is for the fleet file that --calibrate writes")
    limits = None if slo is None else slo_of(slo)
    seen = read_trace(trace, limit=limit)
    with saying("simulating") as say:
        if calibrate:
            if not seen.measured:
                raise InputError(f"{trace}: --calibrate needs ttft and e2e in every line (assay loadtest --samples)")
            say("finding the times of the server")
            try:
                times = simulator.calibrated(seen.measured, max_running=max_running, chunk=chunk, clients=clients)
            except ValueError as error:
                raise InputError(f"{trace}: {error}") from None
            servers = Fleet((simulator.Server("measured", times, max_running, chunk=chunk),), {}, _digest(trace))
            if output is not None:
                with atomic_file(output) as temporary:
                    temporary.write_text(
                        fleet_text(
                            times, max_running=max_running, chunk=chunk, source=str(trace), fitted_to=_digest(trace)
                        ),
                        encoding="utf-8",
                    )
        else:
            assert fleet is not None
            servers = read_fleet(fleet)
        requests = [replace(request, at=request.at / faster) for request in seen.requests]
        say(f"simulating {len(requests)} requests on {len(servers.servers)} servers")
        try:
            found = simulator.simulate(requests, servers.servers, clients=clients)
        except ValueError as error:
            raise InputError(str(error)) from None
    document = described(found, servers, limits)
    document["trace"] = {"file": str(trace), "requests": len(requests), "faster": faster, "clients": clients}
    if seen.measured and faster == 1:
        document["measured"] = simulator.summary(seen.measured)
        document["errors"] = simulator.errors(document["predicted"], document["measured"])
        if servers.fitted_to != _digest(trace):  # what the times were fitted to is no prediction
            key = hashlib.sha256(repr((_digest(trace), servers, clients, limit)).encode()).hexdigest()[:32]
            document["past"] = _past(key, document["errors"])
    if calibrate:
        document["times"] = vars(servers.servers[0].times)
    if json:
        print_json(document)
    else:
        _print(document)


def described(found: Any, fleet: Any, limits: Any = None) -> dict[str, Any]:
    """A simulation as JSON: what users see, and each server's busy share and rows a step, with watts and price where it has a device."""
    from assay.methods.core.fleet import simulator

    predicted = simulator.summary(found.served)
    if limits is not None and found.served:
        within = sum(
            all(
                limit is None or value is None or value <= limit
                for limit, value in ((limits.ttft, one.ttft), (limits.itl, one.itl), (limits.e2e, one.e2e))
            )
            for one in found.served
        )
        predicted["within_slo"] = within / (len(found.served) + len(found.refused))
        predicted["goodput_per_second"] = within / predicted["seconds"]
    servers = {}
    for server in fleet.servers:
        busy = found.busy(server.name)
        servers[server.name] = {"busy": busy, "rows_a_step": found.rows(server.name)}
        device = fleet.devices.get(server.name)
        if device is not None:
            servers[server.name] |= {
                "watts": device.watts(busy),
                "joules": device.watts(busy) * found.seconds,
                "price": device.price * found.seconds / 3600,
            }
    return {"predicted": predicted, "servers": servers, "refused": len(found.refused)}


def _past(key: str, errors: dict[str, float]) -> dict[str, Any]:
    """Keep the errors of this prediction, once, and say how far off all of them were: the mean of their sizes, by figure."""
    import json

    from assay.paths import data_dir

    file = data_dir() / "predictions.jsonl"
    kept: dict[str, dict[str, float]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            found = json.loads(line)
            kept[found["key"]] = {name: float(value) for name, value in found["errors"].items()}
        except (ValueError, TypeError, KeyError, AttributeError):  # cut off by a crash, or somebody else's
            continue
    if key not in kept:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"key": key, "errors": errors}) + "\n")
        kept[key] = errors
    seen: dict[str, list[float]] = {}
    for one in kept.values():
        for name, value in one.items():
            seen.setdefault(name, []).append(abs(value))
    return {"predictions": len(kept), "mean_error": {name: sum(v) / len(v) for name, v in seen.items()}}


def _digest(file: Path) -> str:
    return hashlib.sha256(file.expanduser().read_bytes()).hexdigest()


def _print(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False)
    predicted, measured = document["predicted"], document.get("measured", {})
    errors, past = document.get("errors", {}), document.get("past", {}).get("mean_error", {})
    out.print(
        f"{predicted['requests']} requests answered"
        + (f", {document['refused']} that no server can hold" if document["refused"] else "")
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ["", "predicted", *(["measured", "error"] if measured else []), *(["past errors"] if past else [])]:
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    titles = {"ttft": "first token, ms", "itl": "between tokens, ms", "e2e": "whole answer, ms"}
    for name, title in titles.items():
        for key, value in (predicted.get(name) or {}).items():
            other, label = (measured.get(name) or {}).get(key), f"{name} {key}"
            cells = [f"{title} {key}", f"{1e3 * value:,.1f}"]
            table.add_row(*cells, *_beside(other, 1e3, errors.get(label), past.get(label), bool(measured)))
    for name, title in (
        ("tokens_per_second", "tokens/s"),
        ("requests_per_second", "requests/s"),
        ("goodput_per_second", "goodput, requests/s"),
        ("within_slo", "within the SLO, share"),
    ):
        if name in predicted:
            beside = _beside(measured.get(name), 1, errors.get(name), past.get(name), bool(measured))
            table.add_row(title, f"{predicted[name]:,.2f}", *beside)
    out.print(table)
    for name, server in document["servers"].items():
        more = f", {server['watts']:.0f} W, {server['price']:.4f} for the trace" if "watts" in server else ""
        out.print(
            f"{name}: busy {100 * server['busy']:.0f} %, {server['rows_a_step']:.1f} rows a step{more}", soft_wrap=True
        )
    if "times" in document:
        found = ", ".join(f"{name} {value:.3g} s" for name, value in document["times"].items())
        out.print(f"times found: {found}", soft_wrap=True)


def _beside(value: float | None, scale: float, error: float | None, past: float | None, measured: bool) -> list[str]:
    if not measured:
        return []
    cells = ["" if value is None else f"{scale * value:,.1f}", "" if error is None else f"{100 * error:+.0f} %"]
    return [*cells, *([f"{100 * past:.0f} %"] if past is not None else [])]
