"""Many small problems, on which every method is compared at its defaults."""
