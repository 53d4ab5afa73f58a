"""The base models HyperAlign knows: one file a family, with its dimensions and its layers in both hosts."""
