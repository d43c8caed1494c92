# Everything is installed into .venv in this checkout; Python 3.11+, pip and make are all it takes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HUB := build/jupyterhub
MUTANTS := build/mutants/venv
SOURCES := $(shell find benchmarks engine recovery schema -name '*.py')

# Compiled modules are kept, also where the environment asks for none: the tests start thousands of processes.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test gate lint types docs bench bench-quick peers jupyterhub mutants constraints clean

help: ## show this
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.installed ## kill an engine again and again, and see that it comes back knowing what is true
	$(BIN)/limpet drill

# The harness of crash tests forks, so its tests want a process with one thread; pytest-xdist's workers have two. They
# run beside the others.
ALONE := tests/testing/
# Many tests wait for something, so there are twice as many workers as cores.
WORKERS := $(shell echo $$((2 * $$(nproc))))
TOGETHER := $(filter-out $(ALONE),$(sort $(dir $(wildcard tests/*/test_*.py))) $(wildcard tests/test_*.py))

# $(call timed,NAME,COMMANDS) says how long they took, also if they failed.
timed = @began=$$(date +%s); ($(2)); status=$$?; took=$$(($$(date +%s) - began)); \
	echo "$(1) took $$((took / 60)) min $$((took % 60)) s"; exit $$status

test: $(VENV)/.installed ## run all tests, of each campaign a fortieth: 5 to 7 minutes on two idle cores
	$(call timed,make test,mkdir -p build; $(BIN)/pytest $(ALONE) >build/alone.txt 2>&1 & alone=$$!; \
		$(BIN)/pytest --numprocesses $(WORKERS) --dist worksteal $(TOGETHER); together=$$?; \
		wait $$alone; alone=$$?; cat build/alone.txt; exit $$((together | alone)))

gate: $(VENV)/.installed ## run the campaigns (kills, power cuts, failing disks, damage, hostile input) as CI does
	$(call timed,make gate,$(BIN)/pytest --numprocesses auto --dist worksteal -m "campaign or long" --campaign-size=gate $(TOGETHER))

starved: $(VENV)/.installed ## run all tests while threads get no processor for a while, at random (root; an hour)
	$(BIN)/python -m tests.campaigns.starve \
		$(BIN)/pytest --numprocesses $(WORKERS) --dist worksteal --timeout 400 $(TOGETHER)

lint: $(VENV)/.installed ## check style and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.installed ## check types
	$(BIN)/mypy
	$(BIN)/mypy docs/examples
	MYPYPATH=benchmarks/peers $(BIN)/mypy benchmarks/peers/crashes.py benchmarks/peers/plot.py

docs: $(VENV)/.installed ## build the documentation into build/site; a warning is an error
	$(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.installed ## compare with peers on this machine's disk
	$(BIN)/limpet bench

bench-quick: $(VENV)/.installed ## the same in a minute, to see that it works
	$(BIN)/limpet bench --quick

peers: $(VENV)/.installed ## crash limpet and its peers, and compare what they say with the truth (root; what is not installed is said)
	$(BIN)/python benchmarks/peers/crashes.py

jupyterhub: $(HUB)/.installed ## try the spawner of docs/examples with a real JupyterHub that is killed (needs npm)
	PATH="$(CURDIR)/$(HUB)/bin:$(CURDIR)/$(HUB)/node_modules/.bin:$$PATH" $(HUB)/bin/python docs/examples/jupyterhub_trial.py

mutants: $(VENV)/.installed $(MUTANTS)/.installed ## change the code a little, again and again: do the tests notice? (root; hours)
	$(BIN)/python -m tests.mutants.named
	$(BIN)/python -m tests.mutants.run

constraints: $(VENV)/bin/uv ## choose the newest versions anew and write them down
	$(BIN)/uv pip compile --quiet --universal --no-header --no-annotate --no-emit-index-url \
		--python-version 3.11 --upgrade --group dev pyproject.toml -o constraints.txt

clean: ## remove what make has made
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# As pip does, uv is to trust the certificates that the system trusts.
export UV_SYSTEM_CERTS ?= true

$(VENV)/bin/uv:
	@echo "Making $(VENV) and installing uv into it"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check uv

$(MUTANTS)/.installed: $(VENV)/bin/uv
	@echo "Installing cosmic-ray into $(MUTANTS)"
	@$(PYTHON) -m venv $(MUTANTS)
	@$(BIN)/uv pip install --quiet --python $(MUTANTS)/bin/python "cosmic-ray==8.7.0"
	@touch $@

$(HUB)/.installed: $(VENV)/bin/uv pyproject.toml $(SOURCES)
	@echo "Installing JupyterHub, its proxy and limpet into $(HUB)"
	@$(PYTHON) -m venv --clear $(HUB)
	@$(BIN)/uv pip install --quiet --python $(HUB)/bin/python "jupyterhub>=5.2" "jupyterlab>=4" --editable .
	@npm install --silent --no-audit --no-fund --prefix $(HUB) configurable-http-proxy
	@touch $@

# Strict editable installs link each file, so a new file asks for a new install: about a second.
$(VENV)/.installed: $(VENV)/bin/uv pyproject.toml constraints.txt $(SOURCES)
	@echo "Installing limpet and what its tests need, at the versions in constraints.txt"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraints constraints.txt --group dev --editable .
	@touch $@
