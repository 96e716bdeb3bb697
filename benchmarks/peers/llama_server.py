"""llama.cpp's own HTTP server, as the package `xllamacpp` has it: python llama_server.py FILE PORT THREADS PARALLEL CONTEXT

Runs in an environment of its own, without assay. Nothing is kept of one prompt for the next.
"""

import sys
import time

import xllamacpp

file, port, threads, parallel, context = sys.argv[1], *map(int, sys.argv[2:6])
params = xllamacpp.CommonParams()
params.model.path = file
params.port = port
params.n_parallel = parallel
params.n_ctx = parallel * context
params.cpuparams.n_threads = threads
params.cpuparams_batch.n_threads = threads
params.cache_prompt = False
params.cache_ram_mib = 0
server = xllamacpp.Server(params)
print(server.listening_address, xllamacpp.get_system_info(), flush=True)
while True:
    time.sleep(3600)
