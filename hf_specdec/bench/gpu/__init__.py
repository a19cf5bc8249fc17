"""Measuring one GPU in a few minutes: `python -m hf_specdec.bench.gpu --out FOLDER`."""
