"""The base models of training, one file per family, behind the `Base` protocol."""
