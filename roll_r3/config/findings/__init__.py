"""Findings: their form, their text for people and programs, and messages about failed writes."""
