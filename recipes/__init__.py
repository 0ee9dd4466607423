"""Recipes, methods and parts as YAML. One copy serves a checkout, an editable install and a wheel."""
