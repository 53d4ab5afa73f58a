"""The base models that can be trained, one file a family, behind one protocol."""
