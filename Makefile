# Every target sets up .venv from requirements.lock when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
RUN ?= runs/quickstart

.PHONY: help install quickstart quickstart-seeds lm-quickstart test test-slow test-newest faults fuzz check docs format lock fashion fashion-fast overhead bench bench-peers tune
.PHONY: same-bits versus mqar probes selective-copying in-context in-context-boolean wide-deep hybrid domain-encoder advmoe moe-lm fashion-vmoe conditions clean

help:
	@echo "make quickstart    train nine networks in one on digits, two minutes on two cores"
	@echo "make quickstart-seeds  the same with three seeds, checked by its acceptance criteria"
	@echo "make lm-quickstart train a language model on the text of Python's standard library and sample from it"
	@echo "make install       set up .venv; EXTRAS=cuda or tpu for accelerators"
	@echo "make test          run the tests; make test-slow runs the slow ones; make test-newest with Python 3.12 and JAX 0.11"
	@echo "make check         lint, format, types and documentation"
	@echo "make docs          build the documentation site into build/docs"
	@echo "make format        format the code"
	@echo "make faults        the fault-injection suite: kills, damaged files, full disks and others, on runs of seconds; make fuzz mutates configs, weight files and files of runs"
	@echo "make same-bits BASE=COMMIT  small runs at another commit and here, compared bit for bit: for changes of structure"
	@echo "make fashion       Fashion-MNIST: one shared network against networks trained alone (about 40 minutes)"
	@echo "make fashion-fast  the best single network in 300 s"
	@echo "make overhead      overhead of the training loop over the bare jitted step"
	@echo "make bench         operations beside their reference implementations and XLA's own, checked against thresholds"
	@echo "make bench-peers   operations and models beside PyTorch and transformers, in an environment of their own (UNIREPLKNET=PATH of the official file)"
	@echo "make versus        tiny Shakespeare beside nanoGPT (NANOGPT=PATH of a checkout, SHAKESPEARE=FOLDER of the text)"
	@echo "make mqar          associative recall by mixer and size of state; make selective-copying, in-context, in-context-boolean, wide-deep, hybrid"
	@echo "make probes        recall and selective copying within an hour (51 minutes on two cores)"
	@echo "make moe-lm        a language model with mixtures of experts beside the dense one of the same active FLOPs; make fashion-vmoe on images"
	@echo "make domain-encoder  sentence encoders for five domains, with experts and without, on pairs of Python's standard library"
	@echo "make advmoe        mixtures of convolutions under attack: alternating beside joint training and dense networks, three seeds"
	@echo "make conditions    seeds, updates, FLOPs, wall time and choices behind every result (FASHION_MNIST=FOLDER of its files, where not installed)"
	@echo "make tune          measure the table that chooses implementations on a CPU"
	@echo "make lock          renew requirements.lock (needs uv)"

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "error: Python %d.%d; Nestax needs 3.11 to 3.13 (make PYTHON=python3.11 ...)" % v)'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --requirement requirements.lock
	@touch $(STAMP)

install: $(STAMP)
	test -z "$(EXTRAS)" || $(PY) -m pip install --quiet --constraint requirements.lock ".[$(EXTRAS)]"

quickstart: $(STAMP)
	$(PY) -m launch.train --config=configs/quickstart.py --workdir=$(RUN)

quickstart-seeds: $(STAMP)
	$(PY) -m launch.reproduce --config=configs/quickstart.py --seeds=0,1,2 --workdir=runs/reproduce --out=results/quickstart

lm-quickstart: $(STAMP)
	$(PY) -m launch.train --config=configs/lm_quickstart.py --workdir=runs/lm_quickstart

test: $(STAMP)
	$(PY) -m pytest -n 2 --dist loadfile -m "not slow"

faults: $(STAMP)
	$(PY) -m tests.faults.suite --kills=50 --readers_s=120 --out=results/faults

fuzz: $(STAMP)
	$(PY) -m tests.faults.fuzz --configs=500 --weights=200 --hostile=200 --run_files=100

same-bits: $(STAMP)
	$(PY) -m tests.same_bits --base=$(BASE)

# The newest JAX that the bounds allow, on the Python that it needs; not of the lock, which is of an older Python.
NEWEST_PYTHON ?= python3.12
.venv-newest/.installed: pyproject.toml
	@$(NEWEST_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { \
	  echo "error: $(NEWEST_PYTHON) does not run here as Python 3.12 or later, which JAX 0.11 needs; give one that does: make test-newest NEWEST_PYTHON=PATH"; exit 1; } >&2
	$(NEWEST_PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet "jax>=0.11,<0.12" ".[dev,docs]"
	@touch $@

test-newest: .venv-newest/.installed
	.venv-newest/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(STAMP)
	$(PY) -m pytest -n 2 --dist loadfile -m slow

check: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(MAKE) docs

# Warnings are errors: a link that leads nowhere, a docstring that cannot be read.
docs: $(STAMP)
	JAX_PLATFORMS=cpu $(PY) -m sphinx -q -W --keep-going -c docs -d build/doctrees . build/docs
	@echo "build/docs/index.html"

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

fashion: $(STAMP)
	$(PY) -m launch.compare --config=configs/fashion_unireplknet_sandwich.py --workdir=runs/fashion --out=results/fashion

fashion-fast: $(STAMP)
	$(PY) -m launch.reproduce --config=configs/fashion_fast.py --workdir=runs/fashion_fast --out=results/fashion_fast

overhead: $(STAMP)
	$(PY) -m launch.bench --config=configs/quickstart.py --csv=results/overhead/quickstart.csv
	$(PY) -m launch.bench --config=configs/fashion_fast.py --csv=results/overhead/fashion_fast.csv
	$(PY) -m launch.bench --config=configs/fashion_unireplknet_sandwich.py --steps=60 --csv=results/overhead/fashion_sandwich.csv

SUITES := selective_scan length attention grouped moe context decoding
bench: $(STAMP)
	@failed=; for suite in $(SUITES); do \
	  $(PY) -m launch.bench --suite=$$suite --csv=results/bench/$$suite.csv --plot=results/bench/$$suite.png || failed="$$failed $$suite"; \
	done; test -z "$$failed" || { echo "thresholds missed or errors in:$$failed"; exit 1; }

# Peers stay out of .venv: PyTorch is large, and nothing of ours needs it.
PEERS := .venv-peers
UNIREPLKNET ?= runs/unireplknet.py
$(PEERS)/.installed: requirements.lock
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --requirement requirements.lock torch==2.13.0 transformers==5.24.0
	@touch $@

bench-peers: $(PEERS)/.installed
	@failed=; for suite in depthwise:torch language_models:transformers unireplknet:unireplknet:$(UNIREPLKNET); do \
	  name=$${suite%%:*}; \
	  $(PEERS)/bin/python -m launch.bench --suite=$$name --peer=$${suite#*:} --csv=results/bench/$$name.csv --plot=results/bench/$$name.png || failed="$$failed $$name"; \
	done; test -z "$$failed" || { echo "thresholds missed or errors in:$$failed"; exit 1; }

NANOGPT ?= runs/nanoGPT
versus: $(PEERS)/.installed
	$(PEERS)/bin/python -m launch.versus --peer=nanogpt:$(NANOGPT) $(if $(SHAKESPEARE),--config.data.dir=$(SHAKESPEARE)) --workdir=runs/versus --out=results/shakespeare \
	  --configs=configs/shakespeare.py:quick,configs/shakespeare.py:small,configs/shakespeare.py:large

# One training process a core: a second core adds little to models of this size.
MIXERS := attention,gated_deltanet,mamba2,gla,mamba,retention,hgrn
MQAR = $(PY) -m launch.sweep --jobs=2 --config=configs/mqar.py --grid=model.pattern=$(MIXERS)
mqar: $(STAMP)
	$(MQAR) --grid=arg=64x4,64x16 --workdir=runs/mqar/64 --out=results/mqar/64 --x=state
	$(MQAR) --grid=arg=128x8,128x32 --workdir=runs/mqar/128 --out=results/mqar/128 --x=state

# The probes that fit an hour: of make mqar all but the small state at length 128. What is finished is not trained again.
probes: $(STAMP)
	$(MQAR) --grid=arg=64x4,64x16 --workdir=runs/mqar/64
	$(MQAR) --grid=arg=128x32 --workdir=runs/mqar/128
	$(MAKE) selective-copying

selective-copying: $(STAMP)
	$(PY) -m launch.sweep --jobs=2 --config=configs/selective_copying.py --grid=model.pattern=$(MIXERS) --grid=arg=smallx16 --workdir=runs/selective_copying --out=results/selective_copying --x=state

in-context: $(STAMP)
	$(PY) -m launch.in_context --config=configs/in_context_linear.py --workdir=runs/in_context_linear --out=results/in_context_linear

in-context-boolean: $(STAMP)
	for function in conjunction dnf parity sparse_parity; do \
	  $(PY) -m launch.in_context --config=configs/in_context_boolean.py:$$function --workdir=runs/in_context_boolean/$$function \
	    --out=results/in_context_boolean/$$function || exit 1; \
	done

wide-deep: $(STAMP)
	$(PY) -m launch.sweep --jobs=2 --config=configs/wide_deep.py --grid=arg=1,2,4,8 --workdir=runs/wide_deep --out=results/wide_deep --x=model.depth

hybrid: $(STAMP)
	$(PY) -m launch.sweep --jobs=2 --config=configs/hybrid.py --grid="model.pattern=mamba2 mamba2 window;mamba2;window" --workdir=runs/hybrid --out=results/hybrid --x=params

DOMAIN_SEEDS ?= 0,1,2
comma := ,
domain-encoder: $(STAMP)
	$(PY) -m launch.sweep --jobs=2 --config=configs/domain_encoder.py --grid=arg=dense,domain --grid=seed=$(DOMAIN_SEEDS) --workdir=runs/domain_encoder --out=results/domain_encoder --x=params
	for arg in dense domain; do for seed in $(subst $(comma), ,$(DOMAIN_SEEDS)); do \
	  $(PY) -m launch.embed --workdir=runs/domain_encoder/arg=$${arg}_seed=$$seed --out=results/domain_encoder/$${arg}_$$seed.csv || exit 1; \
	done; done
moe-lm: $(STAMP)
	$(PY) -m launch.sweep --jobs=2 --config=configs/moe_lm.py --grid=arg=dense,moe --grid=seed=0,1,2 --workdir=runs/moe_lm --out=results/moe_lm --x=params

fashion-vmoe: $(STAMP)
	$(PY) -m launch.sweep --jobs=2 --config=configs/fashion_vmoe.py --grid=arg=dense,moe --grid=seed=0,1,2 --workdir=runs/fashion_vmoe --out=results/fashion_vmoe --x=params

advmoe: $(STAMP)
	$(PY) -m launch.sweep --jobs=2 --config=configs/fashion_advmoe.py --grid=arg=dense,small,joint,alternate --grid=seed=0,1,2 --workdir=runs/advmoe --out=results/advmoe --x=flops

conditions: $(STAMP)
	$(PY) -m tests.documents.conditions $(FASHION_MNIST)

tune: $(STAMP)
	for op in depthwise_conv2d depthwise_conv1d softmax_attention routed_conv; do $(PY) -m launch.bench --tune=$$op || exit 1; done

lock:
	uv pip compile --universal --python-version 3.11 --extra dev --extra docs --no-header --no-emit-index-url --no-annotate pyproject.toml -o requirements.lock
	sed -i '1i # Pinned versions of every dependency, for Python 3.11 to 3.13; made by: make lock' requirements.lock

clean:
	rm -rf $(VENV) $(PEERS) build .pytest_cache .ruff_cache .mypy_cache
