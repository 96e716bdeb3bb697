"""POLCA: more inference servers under one power budget, their clocks lowered only when the row's draw comes near it.

After "POLCA: Power Oversubscription in LLM Cloud Providers" (2023) and its extension, "Characterizing Power Management Opportunities
for LLMs in the Cloud" (ASPLOS 2024). Serving draws its peak in short prompt phases and less while it makes tokens, and a row of many
servers averages that out. So a row provisioned for all peaks at once has room for more servers, if something catches the moments when
it has not: above a first threshold low-priority servers run at a lower clock, above a second one at a lower one still, and if that does
not suffice high-priority servers are slowed a little too. Caps take tens of seconds to act; a brake that slows everybody down acts
within seconds, and is to be avoided altogether.

    row = RowSpec(base=40, added=12)
    trace = synthetic(Workload(), row)                                  # made up, and says so
    uncapped = simulate_row(trace.requests, replace(row, brake_mhz=None), no_capping())
    capped = simulate_row(trace.requests, row, two_thresholds())
    capped.brakes, losses(capped, uncapped)

For an operator: `read_power_trace` and `thresholds` find the two thresholds for a recorded row, `PowerRecorder` records a machine,
`measure_phases` and `calibrated_spec` put measurements in the place of assumptions.

The published policy values (80 %, 89 %, 5 %, the clocks, the delays, the classes of requests) and the hardware's figures are recalled,
not re-read: defaults to be set, not quotations. What draws how much at which clock is our choice where the sources do not say.
When NOT to use it: for training, whose servers rise and fall together; where the load of servers is correlated (`Workload.correlation`: try
it); and for devices whose tokens draw as much as their prompts, which leaves no room. All results are simulated.
"""

from __future__ import annotations

from assay.methods.serving.polca.phases import MeasuredPhases, calibrated_spec, measure_phases
from assay.methods.serving.polca.policy import (
    FULL,
    HIGH,
    LOW,
    Ladder,
    Policy,
    PowerLimit,
    Replay,
    Setting,
    Step,
    no_capping,
    one_threshold,
    two_thresholds,
)
from assay.methods.serving.polca.power import Phase, ServerSpec, fit_power, fit_sensitivity, roofline_times
from assay.methods.serving.polca.recorder import PowerRecorder
from assay.methods.serving.polca.row import (
    GATES,
    Action,
    RowResult,
    RowSpec,
    gates_used,
    goodput,
    losses,
    simulate_row,
)
from assay.methods.serving.polca.thresholds import (
    PowerTrace,
    Thresholds,
    read_power_trace,
    rises,
    thresholds,
    violations,
)
from assay.methods.serving.polca.workload import CLASSES, RequestClass, Workload, dealt, synthetic

__all__ = [
    "Action",
    "CLASSES",
    "FULL",
    "GATES",
    "HIGH",
    "LOW",
    "Ladder",
    "MeasuredPhases",
    "Phase",
    "Policy",
    "PowerLimit",
    "PowerRecorder",
    "PowerTrace",
    "Replay",
    "RequestClass",
    "RowResult",
    "RowSpec",
    "ServerSpec",
    "Setting",
    "Step",
    "Thresholds",
    "Workload",
    "calibrated_spec",
    "dealt",
    "fit_power",
    "fit_sensitivity",
    "gates_used",
    "goodput",
    "losses",
    "measure_phases",
    "no_capping",
    "one_threshold",
    "read_power_trace",
    "rises",
    "roofline_times",
    "simulate_row",
    "synthetic",
    "thresholds",
    "two_thresholds",
    "violations",
]
