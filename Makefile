# Two commands on a machine with Python 3.11+ and make: `make run`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
JOBS ?= 2

.PHONY: run test docs clean

# The main job: a pretrained vision transformer adapted to new images.
run: $(VENV)/.installed
	$(BIN)/python -m experiments.quickstart.run --workdir=runs/quickstart

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# The method pages and the README's table, from docstrings and by probing.
docs: $(VENV)/.installed
	$(BIN)/python -m peftjax.methods --write
	$(BIN)/python -m peftjax.docs

$(VENV)/.installed: setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "peftjax needs Python 3.11 or newer, this is %d.%d; name another by make PYTHON=..." % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
