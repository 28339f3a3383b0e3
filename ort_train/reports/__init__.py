"""The record of a measurement, where it comes from, and its tables, pictures and pages."""
