"""What a recipe needs and costs, found out before it runs."""
