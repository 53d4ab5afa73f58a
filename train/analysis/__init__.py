"""What a finished hypernetwork generates, over a prompt list: the paper's Figures 8, 9 and 12."""
