"""The example library: small adapters that were really trained, with their descriptions and measured accuracy."""
