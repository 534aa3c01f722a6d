"""Programs that make what quantlab bundles; not part of the package."""
