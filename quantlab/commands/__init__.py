"""What the verbs do, one module each; `quantlab.cli` only parses and reports. Imported when a verb runs."""
