"""Rates, pauses, outages, limits: when may the next attempt start?"""
