"""The fleet file: servers with their times and the devices they run on, as TOML.

    [[devices]]
    name = "box"
    flops = 4e11          # operations a second
    bandwidth = 3e10      # bytes a second
    memory = 24e9         # bytes
    idle_watts = 40
    peak_watts = 90
    price = 0.12          # an hour

    [[servers]]
    name = "a"
    count = 2             # a-1 and a-2
    device = "box"
    max_running = 64
    kv_tokens = 200000
    chunk = 256
    tenants = ["german"]  # left out: all
    times = { prefill = 0.0004, step = 0.004, row = 0.0002, context = 1e-7, turn = 0.0001 }   # seconds

`assay simulate --calibrate` writes one from what a server was seen to do.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from assay import checks
from assay.errors import InputError
from assay.methods.core.fleet.hardware import Device
from assay.methods.core.fleet.simulator import Server, StepTimes

LARGEST = 1 << 20  # bytes of a fleet file
MOST = 10_000  # servers


@dataclass(frozen=True)
class Fleet:
    """Servers, the device of each by the server's name where the file names one, and the digest of the trace that times were fitted to."""

    servers: tuple[Server, ...]
    devices: dict[str, Device]
    fitted_to: str = ""


def read_fleet(path: Path | str) -> Fleet:
    """The fleet in a TOML file. Raises InputError, naming the file and the table, for what it may not hold."""
    file = Path(path).expanduser()
    try:
        if file.stat().st_size > LARGEST:
            raise InputError(f"{file} is larger than {LARGEST} bytes: not a fleet file")
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file} is no TOML: {error}") from None
    try:
        return _fleet(found)
    except (ValueError, TypeError) as error:
        raise InputError(f"{file}: {error}") from None


def _fleet(found: Mapping[str, Any]) -> Fleet:
    _only(found, ("servers", "devices", "fitted_to"), "a fleet file")
    fitted_to = found.get("fitted_to", "")
    if not isinstance(fitted_to, str):
        raise TypeError(f"fitted_to must be a text, got {checks.shown(fitted_to)}")
    devices: dict[str, Device] = {}
    for table in _tables(found, "devices"):
        made = _made(Device, table, "devices", ("name", "flops", "bandwidth", "memory"))
        if made.name in devices:
            raise ValueError(f"devices must have names of their own, got {made.name!r} twice")
        devices[made.name] = made
    servers: list[Server] = []
    of: dict[str, Device] = {}
    for table in _tables(found, "servers"):
        settings = dict(table)
        count = checks.whole("count of servers", settings.pop("count", 1), low=1, high=MOST)
        device = settings.pop("device", None)
        if device is not None and device not in devices:
            raise ValueError(
                f"device of servers must be one of {', '.join(devices) or 'the devices (none are given)'}, got {device!r}"
            )
        if not isinstance(settings.get("times"), dict):
            raise ValueError("servers must have times = { prefill = seconds, step = seconds, ... }")
        settings["times"] = _made(StepTimes, settings["times"], "times", ("prefill", "step"))
        settings["tenants"] = _texts("tenants", settings.get("tenants", []))
        server = _made(Server, settings, "servers", ("name", "times"))
        for number in range(1, count + 1):
            name = server.name if count == 1 else f"{server.name}-{number}"
            servers.append(Server(**{**_fields(server), "name": name}))
            if device is not None:
                of[name] = devices[device]
        if len(servers) > MOST:
            raise ValueError(f"servers must be at most {MOST}")
    if not servers:
        raise ValueError("a fleet file must have at least one [[servers]]")
    if len({server.name for server in servers}) < len(servers):
        raise ValueError("servers must have names of their own")
    return Fleet(tuple(servers), of, fitted_to)


def fleet_text(times: StepTimes, *, max_running: int, chunk: int, source: str, fitted_to: str) -> str:
    """A fleet file of one server with these times, said to be found in `source`, whose digest is `fitted_to`."""
    inside = ", ".join(f"{name} = {value!r}" for name, value in asdict(times).items())
    comment = "".join(letter if letter.isprintable() else "?" for letter in source)
    return (
        f"# times found in {comment}\nfitted_to = \"{fitted_to}\"\n\n"
        f"[[servers]]\nname = \"measured\"\ncount = 1\nmax_running = {max_running}\n"
        f"chunk = {chunk}\ntimes = {{ {inside} }}\n"
    )  # fmt: skip


def _fields(server: Server) -> dict[str, Any]:
    return {one.name: getattr(server, one.name) for one in fields(server)}


def _tables(found: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    tables = found.get(name, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise TypeError(f"{name} must be tables, [[{name}]]")
    return tables


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"{name} must be a list of texts, got {checks.shown(value)}")
    return tuple(value)


def _only(table: Mapping[str, Any], allowed: tuple[str, ...], what: str) -> None:
    if unknown := sorted(set(table) - set(allowed)):
        raise ValueError(f"{what} may have {', '.join(allowed)}; got {', '.join(unknown)[:100]}")


def _made(kind: Any, table: Mapping[str, Any], what: str, needed: tuple[str, ...]) -> Any:
    allowed = tuple(one.name for one in fields(kind))
    _only(table, allowed, what)
    if missing := [name for name in needed if name not in table]:
        raise ValueError(f"{what} must have {missing[0]}")
    if "name" in table and (not isinstance(table["name"], str) or not table["name"]):
        raise TypeError(f"name of {what} must be a text, got {checks.shown(table['name'])}")
    return kind(**table)
