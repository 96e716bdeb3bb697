"""Plan and Budget over assay's own server: budgets hold there, and greedy answers are those of the model itself."""

import socket
import threading

import pytest
from tests.tiny import write_tiny_llama
from transformers import AutoTokenizer, LlamaForCausalLM

from assay.methods.core.reasoning.generator import HttpGenerator, Sampling, TransformersGenerator
from assay.methods.reasoning.plan_and_budget import ModelPlanner, Plan, PlanAndBudget, RulePlanner, prompt_tokens

pytestmark = pytest.mark.slow
GREEDY = Sampling(temperature=0, max_new_tokens=8)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of a server, and its model and tokenizer."""
    import uvicorn

    from assay.server.app import create_app
    from assay.server.models import Models

    folder = write_tiny_llama(tmp_path_factory.mktemp("planned") / "tiny", context=512)
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    models = Models()
    models.add("tiny", model, tokenizer)
    app = create_app(models)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", model, tokenizer
    finally:
        app.state.server.stop()
        server.should_exit = True
        thread.join(20)
        app.state.server.close()
        models.close()


def test_budgets_hold_over_a_server_and_answers_are_the_models(served):
    url, model, tokenizer = served
    here = TransformersGenerator(model, tokenizer)
    plan = Plan(("one", "two three"), (50, 50), 1)
    with HttpGenerator(url, "tiny") as there:
        found = []
        for generator in (there, here):
            planner = RulePlanner(lambda question: plan, prompt_tokens(generator))
            solver = PlanAndBudget(generator, planner, str, totals={1: 10}, sampling=GREEDY)
            found.append(solver.solve(["one two three", "three"]))
    for remote, local in zip(*found, strict=True):
        assert remote.text == local.text
        assert remote.allotted == (8, 2)
        assert remote.used == local.used
        assert all(took <= given for took, given in zip(remote.used, remote.allotted, strict=True))
        assert remote.budget.spent("plan").completion == local.budget.spent("plan").completion > 0
        assert remote.budget.spent("solve").completion == sum(remote.used)
        assert remote.budget.spent("solve").calls == 2


def test_a_model_behind_a_server_plans_for_itself(served):
    """A model of random weights writes no plan: the question is solved in one part, and what planning took is booked all the same."""
    url, *_ = served
    with HttpGenerator(url, "tiny") as there:
        planner = ModelPlanner(there, str, GREEDY)
        (solved,) = PlanAndBudget(there, planner, str, totals={5: 6}, sampling=GREEDY).solve(["one two"])
    assert solved.plan.parts == ("Directly solve the problem.",)
    assert solved.allotted == (6,)
    assert 0 < solved.used[0] <= 6
    assert solved.budget.spent("plan").calls == 2
    assert solved.budget.spent("plan").completion > 0
