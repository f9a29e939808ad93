"""Small trainers, each without SCL and with it: what it takes to put it in.

Every recipe is a folder with two scripts, `dense.py` and `scl.py`, which differ in at
most five lines, and are run by the tests:

    python -m experiments.recipes.linen_train_state.scl
"""
