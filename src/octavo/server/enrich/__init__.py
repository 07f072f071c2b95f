"""Enrichment: a prompt for each row of a table, whose answers become new columns."""
