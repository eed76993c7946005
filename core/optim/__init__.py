"""What happens to parameters at an optimiser step, beyond the optimiser's own."""
