"""The configuration: typed models, the YAML loader, and the rule table. Imports no torch, Ray, or engine."""
