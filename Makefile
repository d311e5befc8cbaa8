# Everything runs inside .venv, which these targets make by themselves. PYTHON may name any Python from 3.11 on.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OP := $(VENV)/.deepspeed_op

# Compiled DeepSpeed ops stay inside .venv; models and data come from this folder, never from a hub.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test kill lint setup clean

setup: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	HF_HUB_OFFLINE=0 $(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# DeepSpeed compiles an op for CPU ranks, a minute's work: here, so that no test waits for it.
$(OP): $(STAMP)
	$(BIN)/python -c 'from reward.engines import prepare_deepspeed_on_cpu; prepare_deepspeed_on_cpu()'
	touch $@

# A folder of its own: what the same config left elsewhere is not the demo's to delete.
demo: $(STAMP)
	$(BIN)/python run_ddpo.py --config configs/ddpo_tinyworld.yaml --output_dir outputs/demo --overwrite_output_dir true

# Two at a time on a thread each: on two cores about twice as fast as one at a time on both. In the files' own order:
# those of few tests are the ones that start several processes, and would come last, all together.
test: $(OP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder

kill: $(OP)
	$(BIN)/python tests/kill_resume.py --kills 200

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build outputs
