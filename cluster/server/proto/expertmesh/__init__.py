"""Namespace of the published protocol; mirrors the proto package name."""
