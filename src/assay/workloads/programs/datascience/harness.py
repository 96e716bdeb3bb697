"""Where a program of a task is run: its arguments made, its value turned into plain data, its figure read.

This file is sent along with the program and imports nothing of assay. Whatever a program returns is plain data when it leaves: bools,
whole numbers, floats, texts, None, lists, and dictionaries as {"__dict__": [[key, value], ...]}.

No feature of `__future__` is turned on here: programs that are compiled here would have it too.
"""

import contextlib
import ctypes
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any

WIDTH, HEIGHT, DPI = 160, 120, 40  # of the picture that is kept of a figure


def prepared(value: Any) -> Any:
    """An argument, with data frames and arrays made of what is marked as such."""
    if isinstance(value, dict):
        if "__frame__" in value:
            import pandas as pd

            # a column of texts keeps its None, which newer versions of pandas would make NaN of
            columns = {
                name: pd.Series(each, dtype=object) if None in each and any(type(x) is str for x in each) else each
                for name, each in value["__frame__"].items()
            }
            return pd.DataFrame(columns)
        if "__array__" in value:
            import numpy as np

            return np.array(value["__array__"])
        return {key: prepared(each) for key, each in value.items()}
    return [prepared(each) for each in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """A value as plain data; raises TypeError for what is none."""
    if value is None or isinstance(value, bool | int | float | str):
        return value if type(value) in (type(None), bool, int, float, str) else _base(value)
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(each) for each in value), key=repr)
    if isinstance(value, dict):
        return {"__dict__": [[plain(key), plain(each)] for key, each in value.items()]}
    if hasattr(value, "to_dict"):  # a series or a data frame
        return plain(value.to_dict())
    if hasattr(value, "tolist"):  # NumPy's
        return plain(value.tolist())
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    raise TypeError(f"a {type(value).__name__} is no plain value")


def _base(value: Any) -> Any:
    return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))


def artists(figure: Any) -> list[dict[str, Any]]:
    """What is drawn in each pair of axes of a figure that was drawn, axes from the top left on: `row` and `column` say where they stand.

    Bars, ticks and texts come in the order that a reader sees, from the left and the bottom (texts from the top).
    """
    from matplotlib.collections import PathCollection, PolyCollection
    from matplotlib.container import BarContainer
    from matplotlib.patches import Wedge

    shown = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    boxes = [axes.get_position(original=True) for axes in shown]
    rows, columns = sorted({-round(box.y1, 3) for box in boxes}), sorted({round(box.x0, 3) for box in boxes})
    found = []
    for axes, box in zip(shown, boxes, strict=True):
        said = _legend(axes, figure)
        dots = [line for line in axes.lines if line.get_linestyle() in ("None", "", " ") and _marked(line)]
        lines = [_curve(line) | {"drawstyle": line.get_drawstyle()} for line in axes.lines if line not in dots]
        clouds = [each for each in axes.collections if isinstance(each, PathCollection)]
        points = [_cloud(each) for each in clouds] + [_curve(line) for line in dots]
        bars = [_bars(group, axes) for group in axes.containers if isinstance(group, BarContainer)]
        for marks in (lines, points, bars):
            if len(marks) == len(said) and not any(
                mark["label"] for mark in marks
            ):  # a legend that was given its texts
                marks[:] = [mark | {"label": text} for mark, text in zip(marks, said, strict=True)]
        xticks, yticks = (_ticks(axis, cells=bool(axes.images)) for axis in (axes.xaxis, axes.yaxis))
        found.append(
            {
                "row": rows.index(-round(box.y1, 3)),
                "column": columns.index(round(box.x0, 3)),
                "title": _title(axes, figure, alone=len(shown) == 1),
                "xlabel": axes.get_xlabel(),
                "ylabel": axes.get_ylabel(),
                "yside": axes.yaxis.get_label_position(),
                "xscale": axes.get_xscale(),
                "yscale": axes.get_yscale(),
                "legend": said,
                "texts": _texts(axes),
                "xticks": [text for _, text in xticks],
                "yticks": [text for _, text in yticks],
                "xtickat": [at for at, _ in xticks],
                "ytickat": [at for at, _ in yticks],
                "lines": lines,
                "points": points,
                "bars": bars,
                "bands": [
                    {"x": _numbers(_corners(path)[:, 0]), "y": _numbers(_corners(path)[:, 1])}
                    for each in axes.collections
                    if isinstance(each, PolyCollection)
                    for path in each.get_paths()
                ],
                "wedges": [
                    {"share": float(each.theta2 - each.theta1) / 360, "label": _label(each)}
                    for each in axes.patches
                    if isinstance(each, Wedge)
                ],
                "images": [_rows(image.get_array()) for image in axes.images],
                "limits": [[float(end) for end in image.get_clim()] for image in axes.images],
            }
        )
    return sorted(found, key=lambda axes: (axes["row"], axes["column"]))


def _title(axes: Any, figure: Any, *, alone: bool) -> str:
    """The title wherever it stands; that of the figure where there is one pair of axes only."""
    said = [axes.get_title(loc) for loc in ("center", "left", "right")]
    return str(next((text for text in said if text), figure.get_suptitle() if alone else ""))


def _legend(axes: Any, figure: Any) -> list[str]:
    """The texts of the legend, or of the figure's."""
    legends = [axes.get_legend()] if axes.get_legend() else figure.legends
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def _ticks(axis: Any, *, cells: bool) -> list[tuple[float, str]]:
    """Where ticks are and what they say, those that say something, from the left or the bottom; those of an image in the order of cells."""
    said = zip(axis.get_majorticklocs(), [label.get_text() for label in axis.get_majorticklabels()], strict=False)
    return sorted(((float(at), text) for at, text in said if text), reverse=not cells and bool(axis.get_inverted()))


def _texts(axes: Any) -> list[str]:
    """Texts in the order of reading."""
    placed = []
    for text in axes.texts:
        if text.get_text():
            x, y = text.get_transform().transform(text.get_unitless_position())
            placed.append((-round(y), round(x), text.get_text()))
    return [text for _, _, text in sorted(placed)]


def _marked(line: Any) -> bool:
    return line.get_marker() not in (None, "None", "", " ")


def _curve(line: Any) -> dict[str, Any]:
    return {"x": _numbers(line.get_xdata()), "y": _numbers(line.get_ydata()), "label": _label(line)}


def _cloud(dots: Any) -> dict[str, Any]:
    at = dots.get_offsets()
    return {"x": _numbers(at[:, 0]), "y": _numbers(at[:, 1]), "label": _label(dots)}


def _bars(group: Any, axes: Any) -> dict[str, Any]:
    """Bars by where they stand and how far they reach, across for horizontal ones, in the order in which a reader sees them."""
    flat = getattr(group, "orientation", "vertical") == "horizontal"
    boxes = [(each.get_x(), each.get_y(), each.get_width(), each.get_height()) for each in group.patches]
    if flat:
        boxes = [(y, x, h, w) for x, y, w, h in boxes]
    boxes.sort(key=lambda box: box[0] + box[2] / 2, reverse=bool((axes.yaxis if flat else axes.xaxis).get_inverted()))
    return {
        "at": [float(start + width / 2) for start, _, width, _ in boxes],
        "length": [float(length) for _, _, _, length in boxes],
        "from": [float(low) for _, low, _, _ in boxes],
        "width": [float(width) for _, _, width, _ in boxes],
        "horizontal": flat,
        "label": _label(group),
    }


def _label(artist: Any) -> str:
    text = str(artist.get_label())
    return "" if text.startswith("_") else text


def _corners(path: Any) -> Any:
    return path.vertices


def _numbers(values: Any) -> list[Any]:
    """Data of an artist: numbers, or what stands for them (texts, days)."""
    return [plain(value) if isinstance(value, str) else float(value) for value in list(values)]


def _rows(values: Any) -> list[Any]:
    import numpy as np

    return np.ma.filled(np.ma.asarray(values, dtype=float), float("nan")).tolist()


def drawn(figure: Any) -> dict[str, Any]:
    """A figure as what is in its axes, and a small grey picture of it, by rows, 0 is black."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(DPI)
    figure.set_size_inches(WIDTH / DPI, HEIGHT / DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # tick labels are there afterwards
    pixels = np.asarray(canvas.buffer_rgba())[:, :, :3].astype(float).mean(axis=2)
    return {"axes": artists(figure), "picture": pixels.round().astype(int).tolist()}


def run(program: str, entry_point: str, arguments: list[Any], kind: str) -> Any:
    """Run a program, call its entry point with the arguments, and give what it returned, or the figure it drew, as plain data."""
    given = [prepared(value) for value in arguments]
    if kind != "visualization":
        return plain(_called(program, entry_point, given))
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.figure import Figure

    plt.close("all")
    returned = _called(program, entry_point, given)
    figure = returned if isinstance(returned, Figure) else plt.gcf()
    return drawn(figure)


def _called(program: str, entry_point: str, given: list[Any]) -> Any:
    names: dict[str, Any] = {"__name__": "program"}
    exec(compile(program, "program", "exec"), names)
    if entry_point not in names:
        raise NameError(f"the program defines no {entry_point}")
    return names[entry_point](*given)


def serve(seconds: float) -> None:
    """Answer jobs, one a line on stdin, in a line each on stdout: {"values": [...], "seconds": processor time} or {"error": text, ...}.

    A job is {"program", "entry_point", "kind", "cases"}, and has a process of its own, forked with the libraries loaded, and so many
    seconds of processor time. What a program prints goes to stderr.
    """
    for name in ("numpy", "pandas", "matplotlib.pyplot"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: no copy looks into this process
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.setpgid(0, 0)
            for number in (reader, answers.fileno()):
                os.close(number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
            with os.fdopen(writer, "w") as pipe:
                pipe.write(json.dumps(_answer(json.loads(line))))
            os._exit(0)
        os.close(writer)
        text = _read(reader, child, 10 * seconds + 10)  # as it may wait for a processor; its own time ends it sooner
        for end in (os.kill, os.killpg):
            with contextlib.suppress(ProcessLookupError):
                end(child, signal.SIGKILL)
        _, _, used = os.wait4(child, 0)
        found = json.loads(text) if text.endswith("}") else {"error": "it ended without an answer"}
        answers.write(json.dumps({**found, "seconds": used.ru_utime + used.ru_stime}) + "\n")
        answers.flush()


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"values": [run(job["program"], job["entry_point"], case, job["kind"]) for case in job["cases"]]}
    except Exception as error:  # whatever a program raises is how it ended
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _read(reader: int, child: int, seconds: float) -> str:
    """What comes before the other end closes, its process ends, or in so many seconds."""
    found, until = b"", time.monotonic() + seconds
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while time.monotonic() < until:
            if select.select([pipe], [], [], 0.05)[0]:
                if not (part := pipe.read(65536)):
                    break
                found += part
            elif os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
    return found.decode("utf-8", "replace")


if __name__ == "__main__":
    serve(float(sys.argv[1]))
