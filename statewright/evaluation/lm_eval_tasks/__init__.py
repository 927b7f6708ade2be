"""Our tasks for lm-eval: a YAML each, found with `--include_path` of this directory."""
