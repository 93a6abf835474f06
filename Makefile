# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
READY = $(VENV)/.ready
PEERS ?= .venv-peers
MDS ?= .venv-mds
FRAMEWORKS ?= .venv-frameworks
HF457 ?= .venv-hf457

.PHONY: demo test slow mds frameworks hf457 lint format bench peers asan tsan clean

demo: $(READY)
	$(RUN) -m mixloader demo $(ARGS)

test: $(READY)
	$(RUN) -m pytest -q $(ARGS)

# Many processes, kills and resumes of examples, fits: what is too long to be waited for at every change.
slow: $(READY)
	$(RUN) -m pytest -q -m slow $(ARGS)

# Against mosaicml-streaming, which wants an older numpy and transformers than .venv has.
mds: $(MDS)/.ready
	$(MDS)/bin/python -m pytest -q tests/mds $(ARGS)

# Under Lightning and torchtitan, with TensorBoard and Weights & Biases.
frameworks: $(FRAMEWORKS)/.ready
	$(FRAMEWORKS)/bin/python -m pytest -q tests/test_lightning.py tests/test_torchtitan.py tests/test_trackers.py $(ARGS)

# With the oldest transformers that Hugging Face's Trainer is mixed in.
hf457: $(HF457)/.ready
	$(HF457)/bin/python -m pytest -q -m 'slow or not slow' tests/test_huggingface.py tests/test_hf_checkpoint.py $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy && $(VENV)/bin/clang-format --dry-run -Werror csrc/*.cpp csrc/*.h

format: $(READY)
	$(RUN) -m ruff check --fix . && $(RUN) -m ruff format . && $(VENV)/bin/clang-format -i csrc/*.cpp csrc/*.h

bench: $(READY)
	$(RUN) -m bench.loader $(ARGS)

# The other loaders that bench.loader measures; mosaicml-streaming wants an older numpy than .venv has.
peers: $(PEERS)/.ready

$(PEERS)/.ready: bench/peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -q torch==2.13.0
	$(PEERS)/bin/python -m pip install -q -r bench/peers.txt
	$(PEERS)/bin/python -m pip install -q --no-deps megatron-core==0.16.1
	touch $@

# The stream tests under a sanitizer, with the extension rebuilt in place; `make clean` afterwards.
asan: $(READY)
	CFLAGS="-g -fno-omit-frame-pointer -fsanitize=address,undefined" LDFLAGS="-fsanitize=address,undefined" $(RUN) setup.py -q build_ext --inplace --force
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 $(RUN) -m pytest -q tests/test_plan.py tests/test_streamer.py tests/test_loader.py tests/test_corpus_core.py tests/test_documents.py tests/test_packed_rows.py

tsan: $(READY)
	CFLAGS="-g -fsanitize=thread" LDFLAGS="-fsanitize=thread" $(RUN) setup.py -q build_ext --inplace --force
	LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" TSAN_OPTIONS=exitcode=66 $(RUN) -m pytest -q tests/test_streamer.py tests/test_loader.py

clean:
	rm -rf build mixloader/_core.*.so *.egg-info $(READY)

# torch comes first and pinned: left to the other requirements, pip may fetch a CUDA build of several gigabytes. The
# writers without theirs: litData asks for torchvision, which beside a CPU-only torch keeps transformers from importing.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt torch setuptools pybind11
	$(RUN) -m pip install -q -c constraints.txt --no-build-isolation -e ".[triton,hf,remote,fit,plot,dev]"
	$(RUN) -m pip install -q -c constraints.txt --no-deps litdata megatron-core
	touch $@

# Without the constraints on what mosaicml-streaming pins itself, or what it needs does.
$(MDS)/.ready: pyproject.toml constraints.txt $(READY)
	test -x $(MDS)/bin/python || $(PYTHON) -m venv $(MDS)
	grep -vE "^(numpy|numba|scipy|matplotlib|tokenizers|transformers|fsspec|s3fs|aiobotocore|aiohttp|moto|xxhash|zstandard|torchdata)==" constraints.txt > $(MDS)/constraints.txt
	$(MDS)/bin/python -m pip install -q -c $(MDS)/constraints.txt torch setuptools pybind11
	$(MDS)/bin/python -m pip install -q -c $(MDS)/constraints.txt --no-build-isolation -e ".[mds]" pytest hypothesis zstandard
	touch $@

# torchtitan without its requirements, among which is a later torch.
$(FRAMEWORKS)/.ready: pyproject.toml constraints.txt $(READY)
	test -x $(FRAMEWORKS)/bin/python || $(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install -q -c constraints.txt torch setuptools pybind11
	$(FRAMEWORKS)/bin/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[lightning,track,hf]" pytest hypothesis
	$(FRAMEWORKS)/bin/python -m pip install -q --no-deps torchtitan==0.3.0 spmd_types==0.2.3
	$(FRAMEWORKS)/bin/python -m pip install -q -c constraints.txt tyro einops "datasets<4.8" torchdata
	touch $@

$(HF457)/.ready: pyproject.toml constraints.txt $(READY)
	test -x $(HF457)/bin/python || $(PYTHON) -m venv $(HF457)
	grep -vE "^(transformers|tokenizers)==" constraints.txt > $(HF457)/constraints.txt
	$(HF457)/bin/python -m pip install -q -c $(HF457)/constraints.txt torch setuptools pybind11
	$(HF457)/bin/python -m pip install -q -c $(HF457)/constraints.txt --no-build-isolation -e ".[hf]" "transformers==4.57.*" pytest hypothesis
	touch $@
