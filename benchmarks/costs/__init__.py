"""What the methods and their parts cost: time, memory, compilation."""
