# Each target sets up what it needs: a virtual environment in .venv with the pinned versions, once.
.DEFAULT_GOAL := help
.PHONY: help figures test quick oldest fuzz lab bench test-browser voila-class site constraints clean

PY      := .venv/bin/python
EXTRAS  := test,class,browser,site,published,bench
OLDEST  := .venv-oldest/bin/python
QUICK   := kfac_viz/method kfac_viz/scores tests/method tests/test_one_page.py
POOL    := 3
TORCH   :=
THREADS := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
CHROMIUM = $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

# The kernel of .venv, not one of the same name that the user has installed elsewhere.
export JUPYTER_PREFER_ENV_PATH := 1

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 22

figures: .venv/ready  ## make the figures again, and compare them with the published: ARGS=--publish puts them in place
	@$(PY) -m kfac_viz figures $(ARGS)

test: .venv/ready  ## run the tests, then the linter and the formatter
	$(THREADS) $(PY) -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check --quiet .

quick: .venv/ready  ## run the doctests and the linear algebra, in less than a minute
	$(THREADS) $(PY) -m pytest -q -n logical --maxprocesses 8 --dist worksteal $(QUICK) $(ARGS)

oldest: .venv-oldest/ready  ## try the least versions of all packages: an environment of its own, the fast tests
	$(THREADS) $(OLDEST) -m pytest -q $(QUICK) 'tests/studies/test_notebooks.py::test_runs_from_top_to_bottom[02_kfac]' $(ARGS)

fuzz: .venv/ready  ## try the public API at random: ARGS="--tries 100000 --jobs 2"
	@$(PY) tests/fuzz.py $(ARGS)

lab: .venv/ready  ## open JupyterLab on the notebooks
	@$(THREADS) $(PY) -m jupyterlab --ip=127.0.0.1 --LabApp.default_url=/lab/tree/notebooks $(ARGS)

bench: .venv/ready  ## measure timings on this machine and print them
	@$(PY) tests/benchmarks $(ARGS)

test-browser: .venv/ready  ## test the notebooks in a real Chromium
	@[ -n "$(CHROMIUM)" ] || { echo "No browser found: install chromium (Debian: apt-get install chromium)" \
	    "and run make test-browser again." >&2; exit 1; }
	$(THREADS) $(PY) -m pytest -m browser tests $(ARGS)

voila-class: .venv/ready  ## serve the playground to a class
	@$(THREADS) $(PY) -m voila notebooks/class/playground.ipynb --no-browser --token --preheat_kernel=True --pool_size=$(POOL) \
	    --MappingKernelManager.cull_idle_timeout=600 --MappingKernelManager.cull_interval=60 $(ARGS)

site: .venv/ready  ## build the static site into site/: every notebook executed, some minutes the first time
	@$(THREADS) $(PY) -m sphinx -b html -q $(ARGS) notebooks site
	@echo "site/index.html"

clean:  ## remove .venv, caches and executed notebooks; figures/ stays
	rm -rf .venv .venv-oldest site figures/.made .pytest_cache .ruff_cache .hypothesis build kfac_viz.egg-info
	find kfac_viz tests notebooks -name __pycache__ -prune -exec rm -rf {} +

# ---- set-up ------------------------------------------------------------------------------------------

# Sets $$python to a Python that can make virtual environments, or says what is missing.
define FIND_PYTHON
python=; old=; bare=; \
for p in "$${PYTHON:-python3.13}" python3.13 python3.12 python3.11 python3; do \
    "$$p" -c '' 2>/dev/null || continue; \
    "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { old=$$p; continue; }; \
    "$$p" -c 'import ensurepip, venv' 2>/dev/null || { bare=$$p; continue; }; \
    python=$$p; break; \
done; \
if [ -z "$$python" ]; then \
    if [ -n "$$bare" ]; then echo "$$bare cannot make virtual environments: install its venv module" \
        "(Debian, Ubuntu: apt-get install python3-venv) and run make again."; \
    elif [ -n "$$old" ]; then echo "Python 3.11 or newer is needed; $$old is $$($$old -V 2>&1)." \
        "Install a newer one, or name it: PYTHON=/path/to/python3.12 make"; \
    else echo "Python 3.11 or newer is needed and none was found. Install it" \
        "(Debian, Ubuntu: apt-get install python3 python3-venv), or name it: PYTHON=/path/to/python3.12 make"; \
    fi >&2; exit 1; \
fi
endef

# On Linux TORCH=cpu and TORCH=cuda choose PyTorch's build. Without it the build in .venv stays; a new .venv gets cpu.
# Elsewhere the package index has one build for each system. Sizes are those of Linux x86-64, of the pinned versions.
CPU_INDEX  := https://download.pytorch.org/whl/cpu
CPU_SIZE   := 0.2 GB
CUDA_SIZE  := 2.8 GB
OTHER_SIZE := 0.3 GB
PROBE      := import torch; print("cuda" if torch.version.cuda else "cpu", torch.__version__.split("+")[0])

ifneq ($(filter-out cpu cuda,$(TORCH))$(word 2,$(TORCH)),)
$(error TORCH is cpu or cuda; got $(TORCH))
endif

# The stamp holds the checkout's path, as an editable install has to be renewed after a move, and PyTorch's build.
STAMP := $(shell $(PY) -c '' 2>/dev/null && cat .venv/ready 2>/dev/null)
ifneq ($(STAMP),$(CURDIR) $(or $(TORCH),$(lastword $(STAMP))))
.PHONY: .venv/ready
endif

.venv/ready: pyproject.toml constraints.txt
	@$(FIND_PYTHON); \
	rm -f $@; \
	$(PY) -m pip --version >/dev/null 2>&1 || "$$python" -m venv --clear .venv || exit 1; \
	install() { $(PY) -m pip install --disable-pip-version-check -c constraints.txt "$$@"; }; \
	pin() { sed -n "s/^$$1==//p" constraints.txt; }; \
	there=$$($(PY) -c '$(PROBE)' 2>/dev/null); build=$(TORCH); build=$${build:-$${there%% *}}; build=$${build:-cpu}; \
	echo "Setting up .venv with $$($(PY) -V). What is missing is downloaded: $(OTHER_SIZE) of packages beside PyTorch,"; \
	if [ "$$there" = "$$build $$(pin torch)" ]; then \
	    echo "and nothing of PyTorch: $$(pin torch), the $$build build, is there."; \
	elif [ "$$(uname -s)" != Linux ]; then \
	    echo "and PyTorch, at most $(CPU_SIZE)."; \
	elif [ "$$build" = cuda ]; then \
	    echo "and PyTorch's CUDA build with its libraries, $(CUDA_SIZE) (TORCH=cpu: $(CPU_SIZE))."; \
	    install --no-deps "torch===$$(pin torch)" "torchvision===$$(pin torchvision)" || { \
	        echo "PyTorch's CUDA build could not be installed from the package index (see above)." >&2; exit 1; }; \
	else \
	    echo "and PyTorch's CPU build, $(CPU_SIZE) (TORCH=cuda, for an NVIDIA GPU: $(CUDA_SIZE))."; \
	    install --no-deps --force-reinstall --retries 1 --extra-index-url $(CPU_INDEX) \
	        "torch==$$(pin torch)+cpu" torchvision || { \
	        echo "PyTorch's CPU build could not be installed from $(CPU_INDEX) (see above)." >&2; \
	        [ -z "$(TORCH)" ] || exit 1; \
	        echo "The package index's build is taken instead: where that is the CUDA build, $(CUDA_SIZE)." >&2; }; \
	fi; \
	install -e '.[$(EXTRAS)]' || { \
	    echo "The packages could not be installed (see above). They come from the Python package index:" \
	    "check the network or the proxy, then run make again; it goes on where it stopped." >&2; exit 1; }; \
	there=$$($(PY) -c '$(PROBE)') || exit 1; \
	case "$$there" in "$(TORCH)"*) ;; *) \
	    echo "There is no $(TORCH) build of PyTorch for this system here: .venv has the $${there%% *} build." >&2; exit 1;; \
	esac; \
	printf '%s\n' "$(CURDIR)" "$${there%% *}" > $@

# On Python 3.11, the least one, with the package index's PyTorch; pip takes a build of that version that is there.
.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	@python="$${PYTHON:-python3.11}"; \
	"$$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	    echo "The least versions need Python 3.11. Install it, or name it: PYTHON=/path/to/python3.11 make oldest" >&2; \
	    exit 1; }; \
	rm -f $@; \
	$(OLDEST) -m pip --version >/dev/null 2>&1 || "$$python" -m venv --clear .venv-oldest || exit 1; \
	$(OLDEST) -m pip install --disable-pip-version-check -c constraints-oldest.txt -e '.[$(EXTRAS)]' || { \
	    echo "The packages could not be installed (see above)." >&2; exit 1; }; \
	touch $@

constraints:  ## renew constraints.txt with the newest versions that pyproject.toml allows
	@$(FIND_PYTHON); set -e; tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	"$$python" -m venv "$$tmp/venv"; \
	"$$tmp/venv/bin/python" -m pip install '.[$(EXTRAS)]'; \
	{ grep '^#' constraints.txt; "$$tmp/venv/bin/python" -m pip freeze --exclude kfac_viz \
	    | sed 's/+[A-Za-z0-9.]*$$//'; } > "$$tmp/new"; \
	cat "$$tmp/new" > constraints.txt
