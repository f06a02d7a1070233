# nanoalign. `make help` lists what there is; `make train` is the place to start.
PYTHON ?= python3
OUT    ?= $(if $(QUICK),runs/quick,runs/story)
SEED   ?= 0
# For real things: a Llama folder, preference files, objectives; see the README's recipe.
MODEL      ?=
DATA       ?=
OBJECTIVES ?=
POLICY     ?=
# Not empty: begin again where the folder holds another run.
OVERWRITE  ?=
# More options for the script that a target runs (`make train MODEL=`: for train.py), and for data.py reformulate.
ARGS       ?=
PAIRING    ?=
# A Python that has transformers, datasets and trl, to be timed beside ours.
PEER       ?=
PY = .venv/bin/python

.PHONY: help setup train morlaif play ablate compare runs test quick campaign lint align eval bench gpu clean clean-runs

help:   ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

.venv/.installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@touch $@

setup: .venv/.installed  ## make .venv and install requirements.txt into it

train: setup  ## the whole story on the embedded world, QUICK=1: everything once, in a minute; or an aligner on real data:
train: ## MODEL= DATA=, with options for train.py and for the pairs: ARGS="--lr 1e-4" PAIRING="--dominance"
ifeq ($(MODEL),)
	$(if $(DATA),$(error DATA= is for an aligner on real data; give MODEL=FOLDER, which it begins with, too))
	$(PY) story.py --out $(OUT) --seed $(SEED) $(if $(QUICK),--quick) $(ARGS)
else
	$(if $(filter file,$(origin OUT)),$(error give OUT=FOLDER too; by default it is the story's))
	$(if $(QUICK),$(error QUICK=1 is the story's, on the embedded world; leave it or MODEL= out))
	$(PY) data.py reformulate $(DATA) --out $(OUT)/pairs.jsonl --seed $(SEED) \
	    $(if $(OBJECTIVES),--objectives $(OBJECTIVES)) $(PAIRING)
	$(PY) train.py aligner --model $(MODEL) --data $(OUT)/pairs.jsonl --out $(OUT)/aligner --seed $(SEED) \
	    $(if $(OVERWRITE),--overwrite,--resume) $(ARGS)
endif

morlaif: setup  ## MORLAIF on the embedded world, with its paper's figures; QUICK=1: one seed, fewer scalarizations
	$(PY) morlaif.py $(if $(QUICK),--quick)

play: setup  ## your own wishes, edited by the aligner of `make train`, and what came of them; POLICY=toxic and others
	$(PY) play.py --run $(OUT) $(if $(POLICY),--policy $(POLICY))

ablate: setup  ## what following anybody's words takes, and what it costs: hours; goes on after a kill; ARGS="--seeds 0"
	$(PY) ablate.py $(ARGS)

compare: setup  ## the rivals of both papers, measured: hours, goes on after a kill; QUICK=1: eight of them
	$(PY) compare.py $(if $(QUICK),--quick) $(ARGS)

align: setup  ## edit the answers in DATA= with the aligner in MODEL= towards OBJECTIVES=
	$(PY) align.py --model $(or $(MODEL),$(OUT)/aligner) --data $(DATA) \
	    --objectives $(or $(OBJECTIVES),harmless helpful) $(if $(POLICY),--policy $(POLICY)) --out $(OUT)/aligned.jsonl --seed $(SEED) $(ARGS)

eval: setup  ## judge OUT=/aligned.jsonl (or DATA=) into OUT=/eval; JUDGE= "--judge-url URL --judge-model NAME" on real data
	$(PY) eval.py $(or $(DATA),$(OUT)/aligned.jsonl) --out $(OUT)/eval $(JUDGE) $(ARGS)

runs: setup  ## runs side by side: options, losses, figures; RUNS="runs/a runs/b" (or python runs.py --help)
	$(PY) runs.py $(or $(RUNS),$(OUT)) $(ARGS)

bench: setup  ## how fast it is here, in short; PEER=python times transformers and TRL beside it
	$(PY) bench.py --aligner $(OUT)/aligner --steps 2 --count 16 $(if $(PEER),--peer $(PEER)) $(ARGS)

gpu: setup  ## on a machine with a GPU: its tests, and how fast it is, in 15 minutes; without make: python bench.py gpu
	$(PY) bench.py gpu $(if $(PEER),--peer $(PEER)) $(ARGS)

test: setup  ## all tests, in two processes of one thread each
	@log=$$(mktemp); export OMP_NUM_THREADS=1; \
	$(PY) -m pytest -q tests/test_[efh-z]*.py > $$log 2>&1 & second=$$!; \
	$(PY) -m pytest -q tests/test_[a-dg]*.py; first=$$?; \
	wait $$second; status=$$?; cat $$log; rm $$log; exit $$((first + status))

quick: setup  ## the tests that take three minutes
	$(PY) -m pytest -q -m "not slow"

campaign: setup  ## kills, damaged files, sick servers and full disks by the thousand: what survives them; 12 minutes
	$(PY) campaign.py

lint: setup  ## style and unused names, by ruff
	@$(PY) -m ruff --version > /dev/null 2>&1 || $(PY) -m pip install --quiet --disable-pip-version-check ruff
	$(PY) -m ruff check .

clean:  ## remove the virtual environment and caches; trained runs stay
	rm -rf .venv .pytest_cache .ruff_cache __pycache__ tests/__pycache__

clean-runs:  ## remove everything that was trained under runs/
	rm -rf runs
