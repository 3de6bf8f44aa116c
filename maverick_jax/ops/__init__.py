"""Numeric building blocks: plain functions of arrays, without parameters, meshes or files."""
