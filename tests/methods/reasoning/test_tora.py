"""The tool loop: kept caches against a restart, the text of trajectories, what they take, programs, the loss mask and shaping."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from tests.tiny import tiny_model
from transformers import MambaConfig, MambaForCausalLM

from assay.methods.core.reasoning.budget import Budget, Spent
from assay.methods.core.reasoning.generator import Growing, Sample, Sampling, TransformersGenerator, choose, seed_of
from assay.methods.core.sandbox import Limits, Sandbox, protections
from assay.methods.reasoning.tora import (
    CALLS,
    Output,
    PythonTool,
    ToolLoop,
    batch_of,
    blocks,
    cuts,
    example,
    shaped,
    total,
    waiting,
    with_tools,
)
from assay.methods.reasoning.tora import loop as loop_module
from assay.methods.reasoning.tora.text import LIMIT_NOTE, OUTPUT, answer_of, output_block, pieces, shortened
from assay.methods.reasoning.tora.trajectory import Trajectory

CODES = ("print(7)", "print(123)", "1/0", "print('b')", "print('aabb')")
PROGRAM, OTHER, BROKEN, *_ = PROGRAMS = [f"\n```python\n{code}\n```\n" for code in CODES]
BOXED = " so \\boxed{7}"
WORDS = ["<pad>", "<end>", "a", "b", "\n", "\n```\n", *PROGRAMS, OUTPUT, BOXED]
MORE = [*WORDS, f"{OUTPUT}\n", f"b{OUTPUT} a", f"{PROGRAM}{OUTPUT}a"]  # reaching beyond where the model has to stop
SHOWN = ("a", "abab", "ba", "b", "aabb")
TOOL = {f"{code}\n": Output(text, text, text == "ba", 0.25) for code, text in zip(CODES, SHOWN, strict=True)}


class Words:
    """A tokenizer of a few words, some of them whole programs, so that a random model writes trajectories."""

    eos_token_id = 1

    def __init__(self, words=WORDS):
        self.words = words

    def __call__(self, text, add_special_tokens=True):
        ids = []
        while text:
            token = max((w for w in self.words if text.startswith(w)), key=len)
            ids.append(self.words.index(token))
            text = text[len(token) :]
        return {"input_ids": ids}

    def decode(self, tokens):
        return "".join(self.words[token] for token in tokens)


def tool(program):
    return TOOL[program]


LIKELY = {"<pad>": -9.0, "\n": -9.0, "\n```\n": -9.0, OUTPUT: 1.0} | dict.fromkeys(PROGRAMS, 1.0)


def model_of(kind="Llama", words=WORDS, *, likely=LIKELY, **changes):
    """A random model that calls its tool often: some words are made more likely."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]} if kind == "Gemma2" else {}
    if kind == "GPTNeoX":
        del sizes["num_key_value_heads"]
    made = tiny_model(
        kind, vocab_size=len(words), eos_token_id=1, **{"initializer_range": 0.1, **sizes, **changes}
    ).double()
    more = torch.tensor([likely.get(word, 0.0) for word in words])
    made.get_output_embeddings().register_forward_hook(lambda _, __, logits: logits + more.to(logits))
    return made


PROMPTS = ["ab", "ab\na", "aabba", "aabb\nabb"]
WARM = Sampling(temperature=1.0, max_new_tokens=12)


def by_hand(model, tokenizer, prompt, sampling, number, seed, calls=CALLS):
    """A reference: one row, no cache, every token from the whole row."""
    ids = tokenizer(prompt)["input_ids"]
    segments, outputs, asked = [], [], replace(sampling, stop=(*sampling.stop, OUTPUT) if calls else sampling.stop)
    text = ""
    while True:
        grown, own = Growing(tokenizer, asked.stop), list(ids)
        stream = torch.Generator().manual_seed(seed_of(seed, prompt + text, number))
        while not grown.ended:
            with torch.no_grad():
                logits = model(torch.tensor([own])).logits[:, -1].float()
            token = int(choose(logits, asked, [stream]))
            grown.add(token, 0.0, {1}, asked.max_new_tokens)
            own.append(token)
        segments.append(tuple(grown.tokens))
        text += grown.text
        program = waiting(text) if calls and grown.ended == "stop" else None
        if program is None:
            return text, segments, outputs
        outputs.append(TOOL[program])
        before = text + grown.matched
        text += output_block(text, outputs[-1].shown)
        if len(outputs) == calls:
            return text + LIMIT_NOTE, segments, outputs
        whole = grown.text + grown.matched
        kept = grown.tokens if tokenizer.decode(grown.tokens) == whole else grown.tokens[:-1]
        rest = whole[len(tokenizer.decode(kept)) :]
        ids = ids + list(kept) + tokenizer(rest + output_block(before, outputs[-1].shown))["input_ids"]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {}),
        pytest.param("Mistral", {"sliding_window": 9}, marks=pytest.mark.slow),
        pytest.param("Qwen2", {}, marks=pytest.mark.slow),
        ("Gemma2", {"sliding_window": 9}),
        pytest.param("GPTNeoX", {}, marks=pytest.mark.slow),
    ],
)
def test_a_kept_cache_writes_what_a_restart_and_a_reference_write(kind, changes):
    """Rows of many lengths, left padded, some of them waiting: token for token."""
    model, tokenizer = model_of(kind, MORE, **changes), Words(MORE)
    model = model.float() if kind == "Gemma2" else model  # its eager attention makes NaN of padding in double precision
    kept = ToolLoop(model, tokenizer, batch=9)(PROMPTS, WARM, tool, n=3, seed=3)
    again = ToolLoop(model, tokenizer, batch=9, reuse=False)(PROMPTS, WARM, tool, n=3, seed=3)
    written = 0
    for prompt, rows, others in zip(PROMPTS, kept, again, strict=True):
        for number, (row, other) in enumerate(zip(rows, others, strict=True)):
            assert [one.tokens for one in row.segments] == [one.tokens for one in other.segments]
            assert (row.text, row.ended, row.outputs) == (other.text, other.ended, other.outputs)
            if number == 1:
                text, segments, outputs = by_hand(model, tokenizer, prompt, WARM, number, 3)
                assert (row.text, [one.tokens for one in row.segments]) == (text, segments)
                assert list(row.outputs) == outputs
            written += len(row.outputs)
    assert written > 3
    assert total(kept[0][0]).completion == sum(len(one.tokens) for one in kept[0][0].segments)


def test_through_a_generator_it_is_the_same_and_restarts_read_the_whole_text():
    model, tokenizer = model_of(), Words()
    generator = TransformersGenerator(model, tokenizer, name="tiny")
    restarted = with_tools(generator, PROMPTS, WARM, tool, n=3, seed=5)
    kept = ToolLoop(model, tokenizer)(PROMPTS, WARM, tool, n=3, seed=5)
    several = 0
    for rows, others in zip(restarted, kept, strict=True):
        for row, other in zip(rows, others, strict=True):
            assert (row.text, row.ended, row.answer) == (other.text, other.ended, other.answer)
            assert [one.spent.prompt for one in row.segments] == [one.spent.prompt for one in other.segments]
            assert row.tool_tokens == other.tool_tokens
            several += len(row.segments) > 1
            if len(row.segments) > 1:
                assert total(row, kept=None).tokens > total(other, kept=None).tokens
    assert several > 3
    third = with_tools(generator, PROMPTS, WARM, tool, n=1, first=2, seed=5)
    assert [[one.text for one in own] for own in third] == [[own[2].text] for own in restarted]


def test_a_fence_that_is_not_on_its_own_line_is_the_tools_in_the_text_and_in_the_tokens():
    """The model closes its program with a space behind the fence, and calls on the same line."""
    closed = f"{PROGRAM.rstrip()} "
    words = [*WORDS, closed]
    model, tokenizer = model_of(words=words, likely=LIKELY | {closed: 4.0, OUTPUT: 2.0}), Words(words)
    kept = [one for (one,) in ToolLoop(model, tokenizer)(PROMPTS, WARM, tool, seed=2)]
    others = with_tools(TransformersGenerator(model, tokenizer, name="tiny"), PROMPTS, WARM, tool, seed=2)
    for row, (other,) in zip(kept, others, strict=True):
        assert row.text == other.text
        assert [one.spent.prompt for one in row.segments] == [one.spent.prompt for one in other.segments]
    assert any(f"{closed}\n{OUTPUT}\n" in row.text for row in kept)


def fed(model, run):
    """The tokens that a model is given in calls of more than one token a row, padding left out, and what `run` returns."""
    seen = []

    def note(_, args, kwargs):
        width = kwargs["input_ids"].shape[1]
        if width > 1 or kwargs.get("logits_to_keep"):
            seen.append(int(kwargs["attention_mask"][:, -width:].sum()))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        return run(), sum(seen)
    finally:
        hook.remove()


def test_outputs_are_read_alone_and_every_token_is_accounted_for():
    """What the model was given, counted at its door, is what the trajectories say; a restart is given the sum of all contexts."""
    model, tokenizer = model_of(), Words()
    (rows, read), (others, again) = (
        fed(model, lambda reuse=reuse: ToolLoop(model, tokenizer, reuse=reuse)(PROMPTS, WARM, tool, n=4, seed=5))
        for reuse in (True, False)
    )
    every = [one for own in rows for one in own]
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    common = loop_module._common(prompts)
    assert common == 1
    first = sum(map(len, prompts)) - 3 * common  # what all begin with is read once
    later = [pair for one in every for pair in zip(one.segments, one.segments[1:], strict=False)]
    assert len(later) > 6
    tails = [after.spent.prompt - after.spent.cached for _, after in later]
    assert read == first + sum(tails)
    for tail, (before, after) in zip(tails, later, strict=True):
        tool_tokens = after.spent.prompt - before.spent.prompt - before.spent.completion
        assert tail in (tool_tokens, tool_tokens + 1)  # the token that called was not run yet
    assert again == first + sum(after.spent.prompt for _, after in later)
    assert again > 2 * read
    assert sum(one.tool_tokens for one in every) == sum(
        after.spent.prompt - before.spent.prompt - before.spent.completion for before, after in later
    )
    charged = [sum(total(one, kept=kept).tokens for one in every) for kept in (True, False)]
    assert charged[1] - charged[0] == sum(before.spent.prompt + before.spent.completion for before, _ in later)
    assert [one.answer for one in every] == [one.answer for own in others for one in own]


def test_the_tool_off_is_plain_decoding_and_an_answer_at_once_calls_nothing():
    model, tokenizer = model_of(), Words()
    plain = TransformersGenerator(model, tokenizer)(PROMPTS, WARM, n=3, seed=1)
    for found in (
        ToolLoop(model, tokenizer)(PROMPTS, WARM, None, calls=0, n=3, seed=1),
        with_tools(TransformersGenerator(model, tokenizer), PROMPTS, WARM, None, calls=0, n=3, seed=1),
    ):
        assert [[one.text for one in own] for own in found] == [[one.text for one in own] for own in plain]
        assert [[one.segments[0].tokens for one in own] for own in found] == [
            [one.tokens for one in own] for own in plain
        ]
    assert any(OUTPUT in one.text for own in plain for one in own)  # nothing stops there
    ((one,),) = with_tools(scripted(["It is \\boxed{4}."]), ["?"], WARM, tool)
    assert (one.outputs, one.answer, one.ended) == ((), "4", "stop")


def scripted(texts, ended="stop"):
    """A generator that says these texts one after the other, whatever it is asked."""
    left = list(texts)

    def generator(prompts, sampling, *, n=1, first=0, seed=0):
        generator.prompts += prompts
        generator.stops.append(sampling.stop)
        return [[Sample(left.pop(0), (), (), ended, Spent(len(text), 3, 0, 1))] for text in prompts]

    generator.prompts, generator.stops, generator.name = [], [], "scripted"
    return generator


def test_calls_are_limited_and_no_text_is_altered():
    ask = scripted([PROGRAM] * 9)
    ((one,),) = with_tools(ask, ["?"], WARM, tool, calls=2)
    part = f"{PROGRAM}{OUTPUT}\na\n```\n"
    assert one.text == part + part + LIMIT_NOTE
    assert (len(one.segments), len(one.outputs), one.ended, one.answer) == (2, 2, "calls", "a")
    assert ask.prompts == ["?", f"?{part}"]
    assert ask.stops == [(OUTPUT,)] * 2
    ((pal,),) = with_tools(scripted([OTHER]), ["?"], WARM, tool, calls=1)
    assert (pal.answer, pal.value, len(pal.segments)) == ("abab", "abab", 1)
    ((failed,),) = with_tools(scripted([BROKEN]), ["?"], WARM, tool, calls=1)
    assert (failed.answer, failed.value) == ("", "")
    ((cut,),) = with_tools(scripted([PROGRAM], ended="length"), ["?"], WARM, tool)
    assert (cut.ended, cut.outputs) == ("length", ())


def test_a_failed_program_is_read_and_charged():
    ((one,),) = with_tools(scripted([BROKEN, PROGRAM, "So \\boxed{7}."]), ["?" * 10], WARM, tool)
    budget = Budget()
    one.charge(budget, kept=True)
    assert one.answer == "7"
    assert f"{OUTPUT}\nba\n```\n" in one.text
    assert budget.spent("tool", failed=True).seconds == 0.25 == budget.spent("tool").seconds / 2
    assert budget.spent("tool", failed=True).tokens == one.segments[1].spent.prompt - 10 - 3
    assert budget.spent("tool", failed=False).calls == 1
    assert budget.spent("solve").completion == 9
    assert budget.spent("solve").tokens == 10 + 9
    restart = Budget()
    one.charge(restart, kept=False)
    assert restart.spent().prompt == sum(one.spent.prompt for one in one.segments) == restart.spent().tokens - 9


def test_programs_run_while_other_rows_are_written():
    model, tokenizer = model_of(), Words()
    steps, seen = [0], []
    model.register_forward_hook(lambda *_: steps.__setitem__(0, steps[0] + 1))

    def patient(program):
        """The first program ends when the model has written on for three steps."""
        if not seen:
            wanted, until = steps[0] + 3, time.monotonic() + 60
            seen.append(False)
            while steps[0] < wanted and time.monotonic() < until:
                time.sleep(0.002)
            seen[0] = steps[0] >= wanted
        return TOOL[program]

    found = ToolLoop(model, tokenizer)(PROMPTS, WARM, patient, n=4, seed=5)
    quick = ToolLoop(model, tokenizer)(PROMPTS, WARM, tool, n=4, seed=5)
    assert seen == [True]
    assert [[one.text for one in own] for own in found] == [[one.text for one in own] for own in quick]


def test_rows_that_come_back_wait_for_each_other(monkeypatch):
    """To join copies the caches of all rows: it is done for as many as are being written, or when none is."""
    joined, real = [], loop_module._Batch.add

    def add(batch, rows):
        joined.append((len(rows), len(batch.rows)))
        real(batch, rows)

    monkeypatch.setattr(loop_module._Batch, "add", add)
    found = ToolLoop(model_of(), Words())(PROMPTS, WARM, tool, n=4, seed=5)
    assert sum(new for new, _ in joined) == sum(len(one.segments) for own in found for one in own) > 16
    assert all(new >= written for new, written in joined)


def test_an_output_that_leaves_no_room_ends_the_trajectory():
    model, tokenizer = model_of(max_position_embeddings=30), Words()
    long = lambda program: Output("ab" * 9, "ab" * 9)  # noqa: E731
    found = [one for own in ToolLoop(model, tokenizer)(PROMPTS, WARM, long, n=4, seed=5) for one in own]
    assert "context" in {one.ended for one in found}
    assert all(len(one.segments) == 1 for one in found if one.ended == "context")
    with pytest.raises(ValueError, match="prompts must fit into 30 tokens with 12 new ones, got 19"):
        ToolLoop(model, tokenizer)(["a" * 19], WARM, tool)


def test_half_precision_and_weights_changed_after_first_use():
    model, tokenizer = model_of().bfloat16(), Words()
    loop = ToolLoop(model, tokenizer)
    before = loop(PROMPTS, WARM, tool, n=2, seed=5)
    assert sum(len(one.outputs) for own in before for one in own) > 0
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    after = loop(PROMPTS, WARM, tool, n=2, seed=5)
    fresh = ToolLoop(model, tokenizer)(PROMPTS, WARM, tool, n=2, seed=5)
    assert [[one.text for one in own] for own in after] == [[one.text for one in own] for own in fresh]
    assert [[one.text for one in own] for own in after] != [[one.text for one in own] for own in before]


def test_a_server_over_http_goes_on_behind_an_output():
    """The prompts, stops and limits of `HttpGenerator` reach a server, and its counts come back."""
    import json
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from assay.methods.core.reasoning.generator import HttpGenerator

    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            text = " It is \\boxed{7}." if OUTPUT in body["prompt"] else PROGRAM
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 5}
            usage["prompt_tokens_details"] = {"cached_tokens": 2 if OUTPUT in body["prompt"] else 0}
            data = json.dumps({"choices": [{"text": text, "finish_reason": "stop"}], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        with HttpGenerator(f"http://127.0.0.1:{server.server_port}/v1", "any") as generator:
            ((one,),) = with_tools(generator, ["3 + 4?"], replace(WARM, stop=("\n\n",)), tool)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
    assert one.answer == "7"
    assert [body["stop"] for body in asked] == [["\n\n", OUTPUT]] * 2
    assert asked[1]["prompt"] == f"3 + 4?{PROGRAM}{OUTPUT}\na\n```\n"
    assert one.segments[1].spent.cached == 2
    assert total(one, kept=None).tokens == 6 + 5 + len(asked[1]["prompt"]) - 2 + 5


# ----------------------------------------------------------------------------------------------------------------- programs


@pytest.mark.skipif(not protections().full, reason="no namespaces here")
def test_programs_are_apart_from_each_other_and_end():
    run = PythonTool(Sandbox(Limits(wall_seconds=60, cpu_seconds=5)))
    first, second = run("secret = 5\nprint(secret)"), run("print(secret)")
    assert (first.shown, first.failed) == ("5", False)
    assert (second.shown, second.failed) == ("NameError: name 'secret' is not defined", True)
    endless = PythonTool(Sandbox(Limits(wall_seconds=0.5, cpu_seconds=5)))("import os\nos.fork()\nwhile True: pass")
    assert (endless.shown, endless.failed) == ("stopped: wall time", True)
    assert endless.seconds > 0.4
    assert run("print('ab' * 300)").shown == "ab" * 100 + "..." + "ab" * 100
    assert run("print('ab' * 300)").printed == "ab" * 300
    assert run("raise SystemExit(3)").failed
    assert (run("pass").shown, run("pass").failed) == ("", False)


def test_the_tool_shows_the_end_of_a_traceback_and_names_what_is_wrong():
    with pytest.raises(TypeError, match="program must be text, got 3"):
        PythonTool(Sandbox(unprotected=not protections().full))(3)
    with pytest.raises(ValueError, match="shown must be"):
        PythonTool(Sandbox(unprotected=not protections().full), shown=1)


# -------------------------------------------------------------------------------------------------------------------- text


def test_blocks_answers_and_cuts():
    text = f"Add.{PROGRAM}{OUTPUT}\n7\n```\nThen.{OTHER}{OUTPUT}\n123\n```\nSo \\boxed{{\\frac{{1}}{{2}}}}."
    assert [block.tag for block in blocks(text)] == ["python", "output", "python", "output"]
    assert answer_of(text) == "1/2"
    assert "".join(part for part, _ in pieces(text)) == text
    assert [part for part, by_tool in pieces(text) if by_tool] == ["\n7\n```\n", "\n123\n```\n"]
    assert cuts(text) == [
        text[: text.index(end)] for end in ("```python\nprint(7)", "Then.", "```python\nprint(123)", "So ")
    ]
    assert answer_of("```python\n# \\boxed{3}\n```\nThe answer is 4.") == "4"
    assert waiting("```python\n# \\boxed{3}\nprint(1)\n```") is not None  # a comment is no answer
    assert waiting(f"\\boxed{{3}}{PROGRAM}") is None
    assert waiting(f"{PROGRAM}{OUTPUT}\n7\n```\n") is None
    assert waiting("```text\nprint(1)\n```") is None
    assert answer_of("nothing") == answer_of("") == ""
    assert answer_of("It was 3, then 5") == "5"
    assert cuts("So 4.") == []
    assert shortened("x" * 401) == "x" * 200 + "..." + "x" * 200
    open_block = "```python\nprint(1)"
    assert (waiting(open_block), answer_of(open_block), pieces(open_block)) == (None, "", [(open_block, False)])


# ----------------------------------------------------------------------------------------------------------------- learning


TEXT = f"a{PROGRAM}{OUTPUT}\na\n```\n{BOXED}"


def test_the_mask_is_that_of_the_loops_tokens():
    tokenizer = Words()
    one, released = (example(tokenizer, "ab", TEXT, variant=variant) for variant in ("paper", "as_released"))
    assert one.input_ids == released.input_ids
    assert tokenizer.decode(one.input_ids) == f"ab{TEXT}<end>"
    assert one.labels[:2] == released.labels[:2] == (-100, -100)
    assert tokenizer.decode([t for t in one.labels if t != -100]) == f"a{PROGRAM}{OUTPUT}{BOXED}<end>"
    assert tokenizer.decode([t for t in released.labels if t != -100]) == f"{TEXT}<end>"
    assert one.learnt == released.learnt - len(tokenizer("\na\n```\n")["input_ids"])
    assert example(tokenizer, "ab", TEXT, end=False).input_ids == one.input_ids[:-1]
    both = batch_of([one, example(tokenizer, "ab", "b")], 0)
    assert both["attention_mask"].sum(1).tolist() == [len(one.input_ids), 4]
    assert both["labels"][1].tolist() == [-100, -100, 3, 1] + [-100] * (len(one.input_ids) - 4)


@pytest.mark.slow
def test_lora_learns_trajectories_and_goes_on_behind_outputs():
    """Through peft and transformers' own loss: the adapters learn to call the tool, and the loop runs the tuned model."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = model_of(likely={}, initializer_range=0.3, hidden_size=32).float(), Words()
    data = batch_of([example(tokenizer, "ab", TEXT), example(tokenizer, "ba", BOXED)], 0)
    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=64, target_modules="all-linear"))
    before = {name: value.clone() for name, value in tuned.named_parameters() if not value.requires_grad}
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        losses.append(tuned(**data).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.2
    assert all(torch.equal(value, before[name]) for name, value in tuned.named_parameters() if name in before)
    merged = tuned.merge_and_unload().eval()
    ((one,), (two,)) = ToolLoop(merged, tokenizer)(["ab", "ba"], replace(WARM, temperature=0), tool)
    assert (one.text, one.answer, len(one.outputs)) == (TEXT, "7", 1)
    assert (two.text, len(two.outputs)) == (BOXED, 0)


def test_what_the_tool_wrote_moves_no_weight():
    """The gradient of an output's own prediction: none in the paper's form, some as released."""
    model, tokenizer = model_of(), Words()
    for variant in ("paper", "as_released"):
        data = batch_of([example(tokenizer, "ab", TEXT, variant=variant)], 0)
        labels = data.pop("labels")
        logits = model(**data).logits.detach().requires_grad_()
        torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100).backward()
        start = len(tokenizer(f"aba{PROGRAM}{OUTPUT}")["input_ids"]) - 1  # it predicts the first token of the output
        moved = logits.grad[0].abs().sum(-1) > 0
        assert moved[start : start + 3].tolist() == [variant == "as_released"] * 3
        assert moved[start - 1]
        assert moved[start + 3]


def test_shaping_keeps_valid_ones_and_corrects_wrong_ones_at_their_steps():
    wrong = f"a{PROGRAM}{OUTPUT}\n7\n```\nSo \\boxed{{8}}."
    asked = []

    def teacher(prompt, beginning):
        asked.append((prompt, beginning))
        return "So \\boxed{7}." if beginning.endswith("```\n") else "and \\boxed{9}"

    def right(prompt, text):
        return "\\boxed{7}" in text

    found = shaped({"?": [wrong, TEXT, TEXT, "b \\boxed{7}", wrong]}, right, teacher)["?"]
    assert found.valid == (TEXT, "b \\boxed{7}")  # distinct, in the order they came
    assert found.corrected == (wrong.replace("8", "7"),)
    assert asked == [("?", cuts(wrong)[-1])]  # the latest cut first, and no other was needed
    assert found.asked == 1
    assert shaped({"?": [wrong]}, right)["?"].corrected == ()
    assert shaped({"?": [wrong]}, right, lambda *_: "no")["?"] == replace(found, valid=(), corrected=(), asked=2)
    five = [f"{n} \\boxed{{7}}" for n in range(5)]
    assert shaped({"?": five}, right)["?"].valid == tuple(five[:4])
    known = f"{cuts(wrong)[-1]}So \\boxed{{7}}."
    assert shaped({"?": [known, wrong]}, right, teacher)["?"].corrected == ()  # there already


# --------------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_named():
    model, tokenizer = model_of(), Words()
    loop = ToolLoop(model, tokenizer)
    with pytest.raises(ValueError, match="calls must be a whole number at least 0, got -1"):
        loop(PROMPTS, WARM, tool, calls=-1)
    with pytest.raises(ValueError, match="n must be"):
        with_tools(scripted([]), PROMPTS, WARM, tool, n=0)
    with pytest.raises(ValueError, match="workers must be"):
        ToolLoop(model, tokenizer, workers=0)
    with pytest.raises(ValueError, match="prompts must hold at least one token each, got ''"):
        loop([""], WARM, tool)
    with pytest.raises(ValueError, match="does not generate"):
        ToolLoop(torch.nn.Linear(2, 2), tokenizer)
    with pytest.raises(ValueError, match="variant must be"):
        example(tokenizer, "ab", TEXT, variant="released")
    with pytest.raises(ValueError, match="prompt and text must hold something"):
        example(tokenizer, "ab", "")
    with pytest.raises(ValueError, match="examples must hold at least one"):
        batch_of([], 0)
    with pytest.raises(ValueError, match="keep must be"):
        shaped({}, lambda *_: True, keep=0)
    sizes = MambaConfig(vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, state_size=4)
    recurrent = MambaForCausalLM(sizes).eval()
    with pytest.raises(TypeError, match="keeps a recurrent state"):
        ToolLoop(recurrent, tokenizer)(PROMPTS, WARM, tool)


def test_an_output_is_an_answer_in_full_and_what_failed_is_none():
    """Votes would be given to error messages, and long numbers lose their middle."""
    called, silent = Sample(PROGRAM, (), (), "stop", Spent(3, 2, 0, 1)), Sample("", (), (), "stop", Spent(9, 1, 0, 1))
    long = Trajectory("?", (called, silent), (Output("11...19", "1" * 450 + "9"),))
    assert (long.answer, long.value) == ("1" * 450 + "9",) * 2
    assert "11...19" in long.text
    failed = Trajectory("?", (called, silent), (Output("NameError: name 'x' is not defined", "3", True),))
    assert failed.answer == failed.value == ""
    said = replace(failed, segments=(called, replace(silent, text="Then it is 12.")))
    assert said.answer == "12"


def test_a_trajectory_without_a_segment_behind_its_output_has_the_programs_value():
    sample = Sample(PROGRAM, (), (), "stop", Spent(3, 2, 0, 1))
    one = Trajectory("?", (sample,), (Output("1...9", "1" * 500 + "9", False, 0.1),), "calls")
    assert one.value == answer_of(f"{OUTPUT}\n{'1' * 500}9\n```\n")
    assert one.tool_tokens == 0
