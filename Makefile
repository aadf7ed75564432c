# Two commands for a newcomer: `make demo` and `make test`. Each builds .venv when needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# CI shortens the demo with `make demo DEMO_ARGS=--quick`; the same way takes your own text.
DEMO_ARGS ?=
TEST_ARGS ?=
# A process that dies is a failure; one started in its place would begin the same test again.
PARALLEL := -n auto --dist loadfile --max-worker-restart 0
# Where no NVIDIA GPU is found torch is held to the version tested on CPU.
CONSTRAINT := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "-c constraints-cpu.txt")

.PHONY: demo test test-all test-vllm lint results clean

demo: $(VENV)/installed
	$(BIN)/mole demo $(DEMO_ARGS)

test: $(VENV)/installed $(VENV)/browser
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow" $(TEST_ARGS)

# With those that start many processes, some minutes more.
test-all: $(VENV)/installed $(VENV)/browser
	$(BIN)/python -m pytest $(PARALLEL) $(TEST_ARGS)

# In an environment of its own, since vLLM takes other versions of what both need.
test-vllm: $(VENV)-vllm/installed
	$(VENV)-vllm/bin/python -m pytest tests/vllm_plugin $(TEST_ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tables of README.md, docs/results.md and docs/serving.md, from the JSON files in docs/results.
results: $(VENV)/installed
	$(BIN)/python docs/render_results.py

# torch goes first: what is installed after it then finds its requirement met and does not
# fetch another build. The file `installed` is written last, so a broken installation is redone.
$(VENV)/installed: pyproject.toml constraints-cpu.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "lookup-experts needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINT) torch
	$(BIN)/python -m pip install --quiet $(CONSTRAINT) --editable '.[train,plot,eval,serve]'
	$(BIN)/python -m pip install --quiet $(CONSTRAINT) --requirement requirements-dev.txt
	touch $@

# Pins hold torch as well, which goes first as above. Then all else as it is pinned, since the wheel
# of vLLM asks for a torch that is on no index.
$(VENV)-vllm/installed: pyproject.toml requirements-vllm.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --constraint requirements-vllm.txt torch
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps --requirement requirements-vllm.txt
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# The browser test drives Debian's chromium. Where it is missing and can't be installed that test
# is skipped and says so.
$(VENV)/browser: $(VENV)/installed
	if ! command -v chromedriver >/dev/null && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core >/dev/null; \
	fi
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-vllm demo
