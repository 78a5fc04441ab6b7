"""Rows into token ids: reading, checking, rendering, tokenising and ordering data. Nothing here knows of models or losses."""
