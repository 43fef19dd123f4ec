"""Programs for scaling laws; `fit` reads runs and writes laws."""
