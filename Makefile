# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set up .venv once.

VENV    := .venv
PYTHON  ?= python3
PY      := $(VENV)/bin/python
PIP     := $(PY) -m pip --disable-pip-version-check
DEMO    ?= demo.mp4
BUDGET  ?= 540
PROMPT  ?= a red ball bounces on a black background

DEMO_MODEL ?= build/demo_model

.PHONY: demo demo-model test docs setup setup-dev lint bench gpu-proof release clean

demo: setup
	$(PY) -m ltxkern generate --model demo --prompt "$(PROMPT)" -o $(DEMO)
	@echo
	@echo 'Next, for example:'
	@echo '  $(VENV)/bin/ltxkern generate --prompt "a big golden ring rolls to the left on a navy background" -o ring.mp4'
	@echo '  $(VENV)/bin/ltxkern generate --prompt "a cyan ring moves right" --image docs/gallery/cyan-ring.png -o from-picture.mp4'
	@echo '  docs/gallery.md shows what else the demo knows, and what each option keeps and costs'

# Trains the demo's model: hours on two cores. It can be stopped at any time, and the same command goes on.
demo-model: setup
	$(PY) -m tools.demo_model --folder $(DEMO_MODEL)

# Two processes of one thread each: threads that spin on a busy machine cost more than they give. Files in their order, or those of
# one long test would all come last and leave a core idle. Bytecode is kept, for the hundreds of processes that tests start.
test: setup-dev
	$(MAKE) --no-print-directory -j2 --output-sync lint docs
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Runtime set: what generating needs.
setup: $(VENV)/.ready
$(VENV)/.ready: pyproject.toml setup.py constraints.txt CMakeLists.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	LTXKERN_BUILD=$${LTXKERN_BUILD:-cpu} $(PIP) install -q -c constraints.txt -e ".[pipeline]"
	touch $@

# Development set, the runtime set included: tests, linters, and Triton, whose interpreter and compiler need no GPU.
setup-dev: $(VENV)/.ready-dev
$(VENV)/.ready-dev: pyproject.toml setup.py constraints.txt CMakeLists.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	LTXKERN_BUILD=$${LTXKERN_BUILD:-cpu} $(PIP) install -q -c constraints.txt -e ".[dev]"
	touch $(VENV)/.ready $@

lint: setup-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

bench: setup-dev
	$(PY) bench/run_all.py --cases small

# What waits for a GPU, within so many seconds, in the environment that is there: .venv, else PYTHON. Results go to bench/results.
gpu-proof:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) bench/gpu_proof.py --budget $(BUDGET)

# The site in build/site; a warning is an error. Nothing is fetched.
docs: setup-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

# sdist, pure, CPU and CUDA wheel in dist/, each tried in an empty environment; RELEASE="--only sdist,pure,cpu" without nvcc.
release: setup-dev
	$(PY) .ci/release.py $(RELEASE)

clean:
	rm -rf build dist $(VENV)/.ready $(VENV)/.ready-dev
