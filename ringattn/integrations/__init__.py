"""Integrates ringattn with other training libraries; each module imports its library, this package none.

Each interface is tested with the real library.
"""
