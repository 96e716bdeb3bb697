"""What a vision server does besides inference, and what that costs (arXiv 2403.12981).

A serving pipeline whose every stage is a switch, and whose every request says where its time went:

- `StageProfiler`, `Lifetime`: borders that divide a request's life; `breakdown`, `flow` (Little's law); `write_spans`, `read_spans`
- `Preprocess`: from a JPEG to an input, plain or with draft decoding, as float32 or bytes; `Workers`: in processes of its own
- `Batcher`: size or time; `Pipeline`: all of it in one object; `VisionServer`, `VisionClient`: over HTTP, by the Open Inference Protocol
- `Cascade`: a detector, whose finds go over a broker to a classifier; `QueueBroker`, `SocketBroker`, `LogBroker`
- `closed_loop`, `open_loop`: clients; `Stage`, `throughput`, `amdahl`, `simulate`, `advice`: what the stages' times foretell

`assay serve --spans FILE` writes the same lifetimes of a language model's requests (`assay.server.dissection`).

The paper's code was not found, and of its text the abstract and two summaries: what they do not say is marked `our choice`. Its 2.25x is
against one earlier system of its authors' choosing, and no constant of nature. Images are prepared by processors only: decoding on a GPU,
which the paper compares with it, is not here.

When NOT to use it: as a production server; it has no keys, no TLS, and answers on loopback only.
"""

from assay.methods.serving.dnn_server_overheads.batcher import Batcher, Stopped
from assay.methods.serving.dnn_server_overheads.brokers import (
    Broker,
    Closed,
    Delivery,
    LogBroker,
    QueueBroker,
    SocketBroker,
    drain,
)
from assay.methods.serving.dnn_server_overheads.capacity import (
    Simulated,
    Stage,
    advice,
    amdahl,
    bottleneck,
    impact,
    simulate,
    throughput,
)
from assay.methods.serving.dnn_server_overheads.cascade import Cascade
from assay.methods.serving.dnn_server_overheads.http import VisionClient, VisionServer
from assay.methods.serving.dnn_server_overheads.load import Load, Sample, closed_loop, open_loop
from assay.methods.serving.dnn_server_overheads.pipeline import INFERENCE, Busy, Pipeline, Refused
from assay.methods.serving.dnn_server_overheads.preprocess import Preprocess
from assay.methods.serving.dnn_server_overheads.profiler import (
    BETWEEN,
    UNSEEN,
    Flow,
    Lifetime,
    Span,
    StageProfiler,
    StageTime,
    breakdown,
    chrome_trace,
    flow,
    read_spans,
    share_outside,
    write_spans,
)
from assay.methods.serving.dnn_server_overheads.wire import Broken, CutOff, Message, packed, unpacked
from assay.methods.serving.dnn_server_overheads.workers import WorkerLost, Workers

__all__ = [
    "BETWEEN",
    "INFERENCE",
    "UNSEEN",
    "Batcher",
    "Broken",
    "Broker",
    "Busy",
    "Cascade",
    "Closed",
    "CutOff",
    "Delivery",
    "Flow",
    "Lifetime",
    "Load",
    "LogBroker",
    "Message",
    "Pipeline",
    "Preprocess",
    "QueueBroker",
    "Refused",
    "Sample",
    "Simulated",
    "SocketBroker",
    "Span",
    "Stage",
    "StageProfiler",
    "StageTime",
    "Stopped",
    "VisionClient",
    "VisionServer",
    "WorkerLost",
    "Workers",
    "advice",
    "amdahl",
    "bottleneck",
    "breakdown",
    "chrome_trace",
    "closed_loop",
    "drain",
    "flow",
    "impact",
    "open_loop",
    "packed",
    "read_spans",
    "share_outside",
    "simulate",
    "throughput",
    "unpacked",
    "write_spans",
]
