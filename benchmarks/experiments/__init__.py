"""The papers' experiments: networks trained with several methods, in tables and plots."""
