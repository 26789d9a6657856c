"""The compiled backend for CPUs: attention over pages, and products with few rows, in C++ that XLA calls"""
