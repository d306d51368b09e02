"""Translation of YAML files written for alibaba/ROLL."""
