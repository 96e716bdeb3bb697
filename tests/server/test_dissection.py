"""Where a token's time goes: lives of answers, from outside the server's parts, and as a file of the command."""

from __future__ import annotations

import json

import pytest
from fastapi.testclient import TestClient

from assay.methods.serving.dnn_server_overheads import breakdown, read_spans
from assay.server.app import create_app
from assay.server.backends import TorchBackend
from assay.server.dissection import Dissection
from assay.server.models import Models
from assay.server.scheduler import Scheduler

FIRST = ["receive", "tokenise", "hand over", "queue", "prefill", "choose", "wake", "detokenise", "send"]
NEXT = ["wait", "step", "choose", "wake", "detokenise", "send"]
ASK = {"prompt": "hello there", "max_tokens": 6, "ignore_eos": True}


@pytest.fixture
def watched(model, tokenizer):
    """A client of a watched server with the real scheduler, and the dissection."""
    models, dissection = Models(), Dissection()
    scheduler = Scheduler(TorchBackend(model, kv_gib=0.01))
    dissection.watch(models.add("tiny", model, tokenizer, scheduler=scheduler))
    client = TestClient(dissection.around(create_app(models)), raise_server_exceptions=False)
    client.app_models = models
    yield client, dissection
    models.close()


def stages(life):
    return [span.stage for span in life.spans]


@pytest.mark.parametrize("stream", [False, True])
def test_every_token_has_a_life_that_is_divided_whole(watched, stream):
    client, dissection = watched
    assert client.post("/v1/completions", json={**ASK, "stream": stream}).status_code == 200
    lives = dissection.profiler.lifetimes()
    first, *later = lives
    assert first.name == "first"
    assert stages(first) == FIRST
    assert {tuple(stages(life)) for life in later} == {tuple(NEXT)}
    assert 1 + sum(int(life.name.split()[1]) for life in later) == ASK["max_tokens"]
    for life in lives:
        assert life.spans[0].start == life.start
        assert all(one.end == two.start for one, two in zip(life.spans, life.spans[1:], strict=False))
    told = [life.start + life.of("wait", "step", "choose") for life in later]
    assert [life.start for life in later][1:] == pytest.approx(told[:-1])  # each begins when the one before was chosen
    assert later[0].start == pytest.approx(first.start + first.of(*FIRST[:6]))


def test_rows_share_the_cost_of_a_step_and_wait_each_in_full(watched):
    client, dissection = watched
    answer = client.post("/v1/completions", json={**ASK, "n": 3, "temperature": 1.0, "stream": True})
    assert answer.status_code == 200, answer.text
    lives = dissection.profiler.lifetimes()
    steps = [span for life in lives for span in life.spans if span.stage == "step"]
    rows = {round(span.seconds / span.cost) for span in steps if span.cost}
    assert 3 in rows  # the first steps may come before all three are there
    assert rows <= {1, 2, 3}
    assert sum(life.name == "first" for life in lives) == 3
    assert sum(one.share for one in breakdown(lives).values()) == pytest.approx(1)


def test_the_time_of_the_model_is_the_models(watched, model):
    client, dissection = watched
    model.delay = 0.02
    client.post("/v1/completions", json=ASK)
    lives = dissection.profiler.lifetimes()
    assert lives[0].of("prefill") >= 0.02
    assert all(life.of("step") >= 0.02 for life in lives[1:])


def test_answers_are_the_same_and_errors_leave_nothing(watched, app_of):
    client, dissection = watched
    plain = TestClient(app_of())
    text = [one.post("/v1/completions", json=ASK).json()["choices"] for one in (client, plain)]
    assert text[0] == text[1]
    seen = len(dissection.profiler.lifetimes())
    assert client.post("/v1/completions", json={"prompt": ""}).status_code == 400
    assert client.get("/v1/models").status_code == 200
    assert client.post("/v1/embeddings", json={"input": "a"}).status_code in (200, 400)
    assert len(dissection.profiler.lifetimes()) == seen


def test_what_was_read_before_anybody_watched_is_answered_all_the_same(watched):
    client, dissection = watched
    (engine,) = client.app_models.engines()
    prepare = engine.prepare

    def unwatched(*given):
        job = prepare(*given)
        del vars(job)["prepared"]
        return job

    engine.prepare = unwatched
    assert client.post("/v1/completions", json=ASK).status_code == 200
    assert not dissection.profiler.lifetimes()


def test_chats_and_responses_are_watched_too(watched):
    client, dissection = watched
    before = 0
    for path, body in (
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "stream": True}),
        ("responses", {"input": "a", "max_output_tokens": 2}),
    ):
        answer = client.post(f"/v1/{path}", json={**body, "ignore_eos": True})
        if answer.status_code == 200:
            assert len(dissection.profiler.lifetimes()) > before
        before = len(dissection.profiler.lifetimes())


def test_a_folder_is_no_file_for_spans(tmp_path):
    from assay.cli.serve import serve
    from assay.errors import InputError

    with pytest.raises(InputError, match="--spans"):
        serve(["m"], port=0, spans=tmp_path)


@pytest.mark.slow
def test_the_command_writes_them_when_it_ends(tiny_folder, tmp_path):
    from assay.experiments.serving import dnn_server_overheads_answers as room

    file = tmp_path / "spans.json"
    waited = room._asked(str(tiny_folder), file, 2)
    lives = read_spans(file)
    assert sum(life.name == "first" for life in lives) == 4  # with the two that warm up
    assert len(waited) == 2
    assert json.loads(file.read_text())["displayTimeUnit"] == "ms"
    assert all(sum(span.seconds for span in life.spans) == pytest.approx(life.seconds) for life in lives)


def test_as_many_lives_as_are_kept_make_a_file_that_can_be_read(tmp_path):
    from assay.methods.serving.dnn_server_overheads import Lifetime, profiler, write_spans
    from assay.server.dissection import MOST

    life = Lifetime("next 12", at=12345.678901234567)
    for number, stage in enumerate(FIRST, 1):
        life.mark(stage, at=life.start + number * 1.2345678901234567e-3, batch=7)
    write_spans([life], tmp_path / "one.json")
    assert MOST * (tmp_path / "one.json").stat().st_size < profiler.LARGEST
