"""Training of adapters: draft models and ensemble heads. Needs `pip install "hf-specdec[train]"`."""
