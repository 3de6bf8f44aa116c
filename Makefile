# make demo    install into .venv, convert the embedded checkpoint, ask it about two pictures on 8 simulated devices
# make test    install the extras test, torch and peft, run all tests; EXTRAS=test leaves out what compares with PyTorch,
#              WORKERS=1 takes half the memory (10 GB) and twice the time
# make clients the clients that people use (openai, anthropic, langchain, ...) against our server, in an environment of their own
# make lint    ruff and pyright
# make docs    README, guides and an API reference as a site in site/

PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= test,torch,peft
WORKERS ?= 2
BIN    := $(VENV)/bin

.PHONY: demo test clients lint docs clean

demo: $(VENV)/installed
	$(BIN)/maverick demo

test: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 2

clients: $(VENV)/installed-test $(VENV)/clients/installed
	MAVERICK_CLIENTS=$(VENV)/clients/bin/python MAVERICK_WHEELS=$(VENV)/clients/wheels MAVERICK_NODE=$(abspath $(VENV)/clients/node) \
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile tests/clients

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/installed-test
	JAX_PLATFORMS=cpu $(BIN)/python docs/site/build.py site

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("maverick-jax needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/installed-test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	touch $(VENV)/installed $@

$(VENV)/clients/installed: $(BIN)/python tests/clients/requirements.txt tests/clients/package.json
	$(BIN)/python -m venv $(VENV)/clients
	$(VENV)/clients/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/clients/requirements.txt
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(VENV)/clients/wheels bfcl-eval
	mkdir -p $(VENV)/clients/node && cp tests/clients/package.json $(VENV)/clients/node
	npm install --silent --prefix $(VENV)/clients/node || echo "npm is missing, or cannot install: its clients are not tried"
	touch $@

clean:
	rm -rf $(VENV) demo build site *.egg-info
