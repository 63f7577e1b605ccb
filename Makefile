# Thin on purpose: dev.py does the work, so that `python dev.py demo` is the same on Windows.
PYTHON ?= python3

.PHONY: demo test gates docs

demo test gates docs:
	$(PYTHON) dev.py $@
