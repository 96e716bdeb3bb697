"""OpenVINO GenAI's continuous batching behind /v1/completions: python openvino_server.py FILE TOKENIZER PORT THREADS

OpenVINO GenAI has no HTTP server, so this is ours, as thin as it can be. It runs in an environment of its own, without assay. A step of
the pipeline holds Python's interpreter lock, so that a second thread could send nothing meanwhile: steps and sockets share the event
loop, and what a step made is sent before the next one. Text is cut into tokens, and put together, by Hugging Face's `tokenizers`, which
is faster than the pipeline's own. The prefix cache is off.
"""

import asyncio
import itertools
import json
import os
import sys
import time
import traceback
from contextlib import asynccontextmanager

import numpy
import openvino
import openvino_genai
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

CACHE_GB = 2
file, tokenizer_file, port, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
scheduler = openvino_genai.SchedulerConfig()
scheduler.cache_size = CACHE_GB
scheduler.enable_prefix_caching = False
scheduler.max_num_seqs = 64
pipeline = openvino_genai.ContinuousBatchingPipeline(
    file, scheduler_config=scheduler, device="CPU", properties={"INFERENCE_NUM_THREADS": threads}
)
tokenizer = Tokenizer.from_file(tokenizer_file)
numbers = itertools.count()
running = {}  # number: (handle, queue of token ids)
asked = asyncio.Event()


async def step_forever():
    """Step while there are requests; hand out what each step made."""
    while True:
        if not running:
            asked.clear()
            await asked.wait()
        pipeline.step()
        for number, (handle, queue) in list(running.items()):
            while handle.can_read():
                for output in handle.read().values():
                    queue.put_nowait(list(output.generated_ids))
            if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                queue.put_nowait(None)
                del running[number]
        for _ in range(3):  # the responses wake, write, and the sockets take it
            await asyncio.sleep(0)


def ended(stepping):
    """A pipeline that failed answers nobody any more: say why, and leave."""
    if not stepping.cancelled():
        traceback.print_exception(stepping.exception())
        os._exit(1)


@asynccontextmanager
async def lifespan(app):
    stepping = asyncio.create_task(step_forever())
    stepping.add_done_callback(ended)
    yield
    stepping.cancel()


app = FastAPI(lifespan=lifespan)


@app.get("/v1/models")
async def models():
    return {"object": "list", "data": [{"id": "openvino", "object": "model"}]}


@app.post("/v1/completions")
async def completions(request: Request):
    body = await request.json()
    if not body.get("stream"):
        return JSONResponse({"error": {"message": "only streams"}}, 400)
    ids = tokenizer.encode(body["prompt"]).ids
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = body["max_tokens"]
    config.ignore_eos = bool(body.get("ignore_eos"))
    config.do_sample = False
    number, queue = next(numbers), asyncio.Queue()
    handle = pipeline.add_request(number, openvino.Tensor(numpy.array([ids], dtype=numpy.int64)), config)
    running[number] = (handle, queue)
    asked.set()
    return StreamingResponse(events(number, handle, queue, len(ids), body), media_type="text/event-stream")


async def events(number, handle, queue, prompt_tokens, body):
    head = {"id": f"cmpl-{number}", "object": "text_completion", "created": int(time.time()), "model": "openvino"}
    decoder, made = DecodeStream(skip_special_tokens=True), 0
    try:
        while (ids := await queue.get()) is not None:
            made += len(ids)
            text = "".join(filter(None, (decoder.step(tokenizer, token) for token in ids)))
            if text:
                yield event(head, [{"index": 0, "text": text, "finish_reason": None}])
        reason = "length" if made >= body["max_tokens"] else "stop"
        yield event(head, [{"index": 0, "text": "", "finish_reason": reason}])
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": made, "total_tokens": prompt_tokens + made}
        yield event(head | {"usage": usage}, [])
        yield "data: [DONE]\n\n"
    finally:
        if number in running:  # the client has left
            handle.cancel()


def event(head, choices):
    return f"data: {json.dumps(head | {'choices': choices})}\n\n"


uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)
