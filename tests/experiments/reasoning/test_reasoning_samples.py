"""Shared samples: drawn once, the same for every experiment, read where they are checked in."""

import gzip
import json

import pytest

from assay.experiments.reasoning import samples as room
from assay.methods.core.reasoning.budget import Budget, Spent
from assay.methods.core.reasoning.generator import Sample
from assay.methods.core.reasoning.samples import SampleCache


class Scripted:
    """Answers 7 to everything, and counts."""

    asked = 0

    def __init__(self, name):
        self.name = name

    def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
        Scripted.asked += len(prompts) * n
        return [
            [Sample(f" {7 + k}", (1,), (-1.0,), "stop", Spent(0 if k > first else 10, 2, 0, 1), "\n") for k in range(first, first + n)]
            for _ in prompts
        ]  # fmt: skip


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    monkeypatch.setattr(room, "_Model", Scripted)
    monkeypatch.setattr(room, "FOLDER", tmp_path / "sets")
    monkeypatch.setattr(room, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(Scripted, "asked", 0)
    room._kept.cache_clear()
    room.generator.cache_clear()
    yield tmp_path
    room._kept.cache_clear()
    room.generator.cache_clear()


def test_samples_are_drawn_once_and_the_first_are_the_same(scripted):
    four = room.shared("sum", 2, n_items=5, n=4)
    assert Scripted.asked == 20
    two = room.shared("sum", 2, n_items=3, n=2)
    assert Scripted.asked == 20
    assert [one.samples for one in two] == [one.samples[:2] for one in four[:3]]
    assert all(one.item.part == "judged" and one.prompt.endswith(f"{one.item.question} =") for one in four)
    assert four[0].answers == ["7", "8", "9", "10"]
    assert four[0].right == [answer == four[0].item.answer for answer in four[0].answers]


def test_the_prompt_is_charged_once(scripted):
    (one,) = room.shared("sum", 2, n_items=1, n=4)
    budget = Budget()
    one.charge(budget, [2, 0, 3])
    assert budget.spent() == Spent(prompt=10, completion=6, calls=3)


def test_sets_that_are_checked_in_need_no_model(scripted, monkeypatch):
    wanted = room.Set("sum", 2, n_items=3, n=4)
    monkeypatch.setattr(room, "SETS", (wanted,))
    before = room.shared("sum", 2, n_items=3, n=4)
    room.main([])
    path = scripted / "sets" / "smollm2-135m.jsonl.gz"
    records = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert len(records) == 12
    assert len(SampleCache(path)) == 12
    written = path.read_bytes()
    room.main([])
    assert path.read_bytes() == written
    room._kept.cache_clear()
    room.generator.cache_clear()
    (scripted / "cache" / "samples" / "smollm2-135m.jsonl").unlink()
    monkeypatch.setattr(Scripted, "__call__", None)
    assert room.shared("sum", 2, n_items=3, n=4) == before
    with pytest.raises(TypeError):
        room.shared("sum", 2, n_items=4, n=4)


def test_what_a_room_draws_besides_is_kept_in_a_file_of_its_own(scripted, monkeypatch):
    monkeypatch.setattr(room, "SETS", (room.Set("sum", 2, n_items=2, n=2),))
    room.main([])
    common = room.shared("sum", 2, n_items=1, n=2)[0]
    sampling = room.sampling_of("sum", False, 0.8)

    class Room:
        @staticmethod
        def draw():
            own = room.generator("smollm2-135m", "plans")
            own(["a plan", common.prompt], sampling, n=2)
            return {"smollm2-135m": own}

    monkeypatch.setattr(room.importlib, "import_module", lambda name: Room)
    room.main(["plans"])
    assert len(SampleCache(scripted / "sets" / "plans-smollm2-135m.jsonl.gz")) == 2  # the common ones lie elsewhere
    room._kept.cache_clear()
    room.generator.cache_clear()
    (scripted / "cache" / "samples" / "smollm2-135m.jsonl").unlink()
    monkeypatch.setattr(Scripted, "__call__", None)
    kept = room.generator("smollm2-135m", "plans")
    assert [sample.spent.prompt for sample in kept(["a plan"], sampling, n=2)[0]] == [10, 0]
    assert kept([common.prompt], sampling, n=2) == [common.samples]
