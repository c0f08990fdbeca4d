# make quickstart     train a small chat model on real conversations and ask it three things (minutes on two cores)
# make test           the tests that need no root
# make test-long      more cases of the same by real runs: other worlds, stages and phases (one to two hours on two
#                     cores); those that need several machines run as root and are skipped for others
# make test-documents every command block of README.md and docs/ (DOCUMENTS=docs/serve.md for one) as it stands; minutes
# make test-cluster   the tests that start sshd, pdsh and several processes (root: installs their Debian packages)
# make gpu-rehearsal  benchmarks/gpu_day.sh on this CPU (a minute); make test-long does it too
# make gpu-wheels     what a GPU machine without an index lacks, into wheels/gpu (GPU_PYTHON=3.12)
# make resolve        both sets of pinned versions (CPU, CUDA), resolved dry for x86_64 and aarch64
# make test-triton    the kernels compiled by the Triton of GPU users, or TRITON=x.y.z; registers, spills and bytes held
# make mutation       the laws' sources changed one place at a time, or LAWS="order packing": what no test notices (hours)
# make crash-consistency  what a power cut at any moment of a save may leave, STATES=600 of them (strace; a minute)
# make fuzz           fuzzers of every door that text from elsewhere comes in by: MINUTES=30, DOORS="yaml data"; what they
#                     find is kept in tests/adversary/corpus, which make test reads again
# make check          ruff, formatting, mypy
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
PYTEST_ARGS ?=
# Several files at a time, in their order: most tests wait for processes of one thread, or for a failure to be noticed.
# A third worker on two cores makes it slower: ranks that wait for each other spin.
PYTEST_WORKERS ?= 2
CLUSTER_WORKERS ?= 2
FILES_AT_A_TIME := --dist loadfile --no-loadscope-reorder
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLUSTER_PACKAGES := openssh-server openssh-client pdsh iproute2 procps faketime slurm-wlm munge tcsh

# DeepSpeed's launcher and compilers are looked up on PATH; one thread per test process, as the tests expect.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install quickstart test test-long test-documents test-cluster mutation fuzz crash-consistency cluster-packages browser-packages extensions gpu-rehearsal gpu-wheels resolve test-triton check format clean

install: $(STAMP)

# Which torch, and the versions that fit it, is launchers/install.py's to decide and to say.
PINS := setup.py $(wildcard constraints*.txt) launchers/install.py

# Only what it needs: the tests' own packages take as long again to install.
$(VENV)/.quickstart: $(PINS)
	$(PYTHON) launchers/install.py $(VENV) quickstart
	touch $@

# Newer than what it was made from, or made anew. pip itself does nothing when all is installed already.
$(STAMP): $(PINS)
	$(PYTHON) launchers/install.py $(VENV) dev,hf,mpi,quickstart
	touch $@

quickstart: $(VENV)/.quickstart
	launchers/quickstart.sh

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(PYTEST_WORKERS) $(FILES_AT_A_TIME) -m "not cluster and not long" $(PYTEST_ARGS)

test-long: $(STAMP) cluster-packages
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(PYTEST_WORKERS) $(FILES_AT_A_TIME) -m long $(PYTEST_ARGS)

# Ends at the first block that fails, with the document and the line. `make test` runs them all too.
test-documents: $(STAMP)
	$(BIN)/python -m tests.documents $(DOCUMENTS)

# pytest exits 5 when it collects nothing: say so rather than pass or fail in silence.
test-cluster: $(STAMP) cluster-packages
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(CLUSTER_WORKERS) $(FILES_AT_A_TIME) -m "cluster and not long" $(PYTEST_ARGS) \
	  || { code=$$?; [ $$code -eq 5 ] && echo "no test is marked cluster" || exit $$code; }

# Debian packages that some tests need: installed for root, named for others, whose tests then say why they skip.
cluster-packages: PACKAGES := $(CLUSTER_PACKAGES)
browser-packages: PACKAGES := chromium tmux strace
cluster-packages browser-packages:
	if dpkg -s $(PACKAGES) >/dev/null 2>&1; then exit 0; \
	elif [ "$$(id -u)" -ne 0 ]; then echo "not root: install $(PACKAGES) yourself; their tests will say why they skip" >&2; \
	else apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(PACKAGES) >/dev/null; fi

# DeepSpeed's CPU Adam, which the first run with an offloaded optimizer would compile: minutes, beside other tests.
extensions: $(STAMP)
	$(BIN)/python -c "from deepspeed.ops.op_builder import CPUAdamBuilder; from lumina.train.deepspeed import extensions; \
	  extensions.build([CPUAdamBuilder()])" >/dev/null

gpu-rehearsal: $(STAMP)
	PYTHON=$(BIN)/python benchmarks/gpu_day.sh --rehearse

GPU_PYTHON ?= 3.12
gpu-wheels: $(STAMP)
	PYTHON=$(BIN)/python benchmarks/gpu_day.sh --collect wheels/gpu --python $(GPU_PYTHON)

# Both sets resolved from the index's metadata alone, whatever this machine is: uv reads no pip configuration, so that a
# local CPU wheel hides nothing. The CPU set is resolved with its own Triton in place of what the stock wheel demands.
resolve: $(STAMP)
	for place in 3.11:x86_64 3.13:aarch64; do python=$${place%:*}; platform=$${place#*:}; for build in cpu cuda; do \
	  override=$$([ $$build = cuda ] || echo "--override $(VENV)/triton.txt"); sed -n '/^triton==/p' constraints-cpu.txt > $(VENV)/triton.txt; \
	  $(BIN)/uv --no-config pip compile --quiet --no-header --no-annotate --python-platform $$platform-manylinux_2_28 \
	    --python-version $$python -c constraints-$$build.txt $$override setup.py --extra dev --extra hf --extra mpi \
	    --extra quickstart --extra serve --extra tracking > $(VENV)/resolved.txt; \
	  echo "constraints-$$build.txt resolves for Python $$python on $$platform: $$(grep -c == $(VENV)/resolved.txt) packages, $$(grep ^torch= $(VENV)/resolved.txt), $$(grep ^triton= $(VENV)/resolved.txt)"; \
	done; done

# The kernels' compiled code under the Triton that a CUDA build of torch brings, beside the pinned one of `make test`.
GPU_TRITON := $(shell sed -n 's/^triton==//p' constraints-cuda.txt)
TRITON ?= $(GPU_TRITON)
test-triton: $(STAMP)
	[ -d build/triton-$(TRITON) ] || { rm -rf build/triton.tmp; $(BIN)/python -m pip install --quiet --no-compile --no-deps \
	  --target build/triton.tmp triton==$(TRITON) && mv build/triton.tmp build/triton-$(TRITON); }
	PYTHONPATH=$(CURDIR)/build/triton-$(TRITON) $(BIN)/python -c "import triton; assert triton.__version__ == '$(TRITON)', triton; print('triton', triton.__version__)"
	PYTHONPATH=$(CURDIR)/build/triton-$(TRITON) OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/kernels/test_static.py

MINUTES ?= 30
DOORS ?=
fuzz: $(STAMP)
	$(BIN)/python -m tests.adversary.fuzz --minutes $(MINUTES) $(if $(DOORS),--door $(DOORS))

mutation: $(STAMP)
	$(BIN)/python -m tests.mutation $(LAWS)

STATES ?= 600
crash-consistency: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.crashes --states $(STATES)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lumina kernels

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
