# `make` lists the targets. PYTHON is the interpreter that .venv is made with.
PYTHON ?= python3
BIN := .venv/bin
# A copy of MovieLens-100K of your own: GroupLens' folder, or one with ml-100k.inter, .user, .item.
ML100K ?=
# The folder data of https://github.com/RUCAIBox/CIKM2020-S3Rec, for reproduce and bench.
S3REC ?=
# GroupLens' folder ml-100k with u1.test … u5.test, for reproduce.
GROUPLENS ?=

.DEFAULT_GOAL := help
.PHONY: help setup data demo demo-ray test check peers bench reproduce soak cuda-build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  ML100K=PATH     demo: use your own copy of MovieLens-100K"
	@echo "  S3REC=PATH      reproduce, bench: the folder with S3-Rec's Beauty.txt and LastFM.txt"
	@echo "  GROUPLENS=PATH  reproduce: GroupLens' folder ml-100k, for the ratings' folds"
	@echo "  PYTHON=PATH     setup: the Python (3.10 or newer) to make .venv with"

setup: ## make .venv, install everything, build the operators (a second call is instant)
	@$(PYTHON) scripts/bootstrap.py

data: setup
	@$(BIN)/python scripts/get_ml100k.py data/ml-100k $(if $(ML100K),--from "$(ML100K)")

demo: data ## pretrain, fine-tune and evaluate on MovieLens-100K
	$(BIN)/torchrec-pt run configs/demo.toml

demo-ray: data ## the same run as a job on a Ray cluster started here, which loses a node half way
	$(BIN)/python scripts/demo_ray.py

test: setup ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: setup ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

peers: setup ## install RecBole and RecTools, for the benchmarks, each in an environment of its own
	@$(BIN)/python benchmarks/peers/environments.py

bench: data peers ## run every benchmark; writes benchmarks/results and docs/benchmarks.md (hours)
	$(if $(S3REC),$(BIN)/python scripts/get_s3rec.py data/beauty --from "$(S3REC)/Beauty.txt")
	@set -e; for bench in benchmarks/bench_*.py; do echo "== $$bench"; $(BIN)/python $$bench; done
	$(BIN)/python benchmarks/benchmarks_page.py

reproduce: setup ## run every recipe over its seeds and the comparisons; writes docs/results.md (hours)
	$(BIN)/python benchmarks/reproduce.py $(if $(S3REC),--s3rec "$(S3REC)") $(if $(GROUPLENS),--grouplens "$(GROUPLENS)")

soak: setup ## run the long tests
	$(BIN)/python -m pytest -m soak

cuda-build: ## compile and link the operators for CUDA, in build/cuda (nvcc, no GPU)
	@$(PYTHON) scripts/cuda_build.py

clean: ## remove what setup and the tools made; data and runs stay
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find torchrec_pt -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
