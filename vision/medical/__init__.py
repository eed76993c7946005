"""Segmentation of medical pictures: vessels, SAM, and the files that clinics use."""
